"""A method is a triple: a Subspace (where the gradient lives), a Rule (how moments turn it into a
direction) and a Lift (how the direction becomes an update of the whole weight)."""
