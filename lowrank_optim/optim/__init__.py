"""Optimizers whose state lives in a low-rank subspace of the gradient.

A method is a triple: a Subspace (where the gradient lives), a Rule (how moments turn it into a direction) and a Lift
(how the direction becomes an update of the whole weight). There is one step, in ``engine.py``, for every method, dtype
and backend. State is declared, never assumed: every part says in ``slots`` which tensors it keeps.

=======================================  ==========================  ====================  ==========================
class                                    subspace                    rule                  lift
=======================================  ==========================  ====================  ==========================
GaLoreAdamW, GaLoreAdamW8bit             TopSingular, Tucker         Adam                  Plain
GaLoreAdafactor                          TopSingular, Tucker         Adafactor             Plain
GoLoreAdamW                              TopThenRandom               FirstMomentMoves      Plain
QGaLoreAdamW8bit                         LazyInt4                    Adam                  Plain
FiraAdamW                                TopSingular                 Adam                  Residual
APOLLOAdamW, APOLLOMini                  Gaussian or TopSingular     Adam                  ChannelScaling
DCTAdamW                                 Columns or Coefficients     CorrectedAdam         ErrorFeedback
Alice                                    TrackedEigen                TrackingAdam          Compensation
LDAdamW                                  Tracking                    ProjectionAwareAdam   its own
FRUGALAdamW                              four that restart           RestartedAdam         SignOutside
Trion                                    Coefficients                NewtonSchulz          Momentum
Muon                                     none: the whole gradient    none                  Orthogonalized
FOAM                                     none: the whole gradient    its correction        ResidualInside
LoRAPre                                  none: the whole gradient    none                  FactoredMoments
SinkGD, RACS, SCALE                      none: the whole gradient    none                  scales of rows and columns
SSTAdamW, LOROAdamW                      none: layers hold factors   Adam                  none
=======================================  ==========================  ====================  ==========================
"""
