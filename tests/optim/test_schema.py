"""The contract of a state, entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.optim import schema
from lowrank_optim.optim.parts import Number, Slot, Slots
from lowrank_optim.optim.state_storage import PART
from tests.optimizers import VARIANTS, build

CPU = torch.device("cpu")
SLOTS: Slots = {
    "step": Number(0),
    "seed": Number(3),
    "left": Number(False, fixed=True),
    "exp_avg": Slot((2, 3), torch.float32),
    "indices": Slot((2,), torch.int64),
    "overlaps": Slot((2,), torch.float32, fill=0.5),
    "pending": Slot((4,), torch.float32, late=True),
}


def state(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    schema.allocate_(made, SLOTS, CPU)
    return {**made, **changes}


def test_a_new_state_holds_what_its_slots_say() -> None:
    made = state()
    assert {key: value for key, value in made.items() if not isinstance(value, Tensor)} == {
        "step": 0, "seed": 3, "left": False,
    }  # fmt: skip
    assert made["exp_avg"].shape == (2, 3) and made["exp_avg"].eq(0).all() and made["overlaps"].eq(0.5).all()
    assert made["indices"].dtype == torch.int64 and "pending" not in made


@pytest.mark.parametrize("key", sorted(schema.OWN))
def test_every_key_of_the_package_is_known(key: str) -> None:
    assert schema.is_own(key) and schema.is_own(f"{key}.codes") and not schema.is_own(f"my_{key}")


@pytest.mark.filterwarnings("ignore:.*among the parameters")
def test_no_method_keeps_what_is_not_known() -> None:
    kept = set()
    for name, kwargs in VARIANTS:
        p = torch.nn.Parameter(torch.zeros(80, 70, dtype=torch.bfloat16))
        optimizer = build(name, [p], **kwargs)
        kept |= {key.partition(".")[0] for key in optimizer.slots_of(p, optimizer.param_groups[0])}
    # Of layers, of a refresh that is under way, and of parameters that are split over processes: none are here.
    assert kept == schema.OWN - {"updates", "pending", *PART}


def test_a_state_that_is_no_longer_split_forgets_where_its_part_was() -> None:
    made = state(axis=-1, length=5, first=2)
    assert schema.fit_(made, SLOTS, CPU, None) and not set(PART) & set(made)


COMPLAINTS: list[tuple[str, Any, str | None]] = [
    ("step", 5, None),
    ("step", None, "nothing, expected an int"),
    ("step", 1.5, "1.5, expected an int"),
    ("left", True, "True, expected False"),
    ("left", False, None),
    ("left", "no", "'no', expected False"),
    ("pending", None, None),
    ("pending", torch.zeros(5), "torch.float32 of shape (5,), expected torch.float32 of shape (4,)"),
    ("exp_avg", None, "nothing, expected torch.float32 of shape (2, 3)"),
    ("exp_avg", 1.0, "1.0, expected torch.float32 of shape (2, 3)"),
    ("exp_avg", torch.zeros(3, 2), "torch.float32 of shape (3, 2), expected torch.float32 of shape (2, 3)"),
    ("exp_avg", torch.zeros(2, 3, dtype=torch.bfloat16), None),
    ("exp_avg", torch.zeros(2, 3, dtype=torch.float64), None),
    (
        "exp_avg",
        torch.zeros(2, 3, dtype=torch.int64),
        "torch.int64 of shape (2, 3), expected torch.float32 of shape (2, 3)",
    ),
    (
        "exp_avg",
        torch.zeros(2, 3, dtype=torch.complex64),
        "torch.complex64 of shape (2, 3), expected torch.float32 of shape (2, 3)",
    ),
    ("indices", torch.zeros(2), "torch.float32 of shape (2,), expected torch.int64 of shape (2,)"),
    (
        "indices",
        torch.zeros(2, dtype=torch.int32),
        "torch.int32 of shape (2,), expected torch.int64 of shape (2,)",
    ),
]


@pytest.mark.parametrize(("key", "value", "wrong"), COMPLAINTS)
def test_what_is_wrong_with_an_entry(key: str, value: Any, wrong: str | None) -> None:
    found = state(**{key: value})
    assert schema.complaint(found, key, SLOTS[key]) == wrong
    if value is None:
        del found[key]
    # Numbers are not asked for: what an older version did not write follows from the slots, but for the step.
    if wrong is None or (value is None and key not in ("step", "exp_avg")):
        schema.checked(found, SLOTS, "w", CPU)
    else:
        with pytest.raises(ValueError, match=f"Invalid state_dict: '{key}' of w is ") as error:
            schema.checked(found, SLOTS, "w", CPU)
        assert str(error.value).endswith(wrong)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_entries_change_their_precision_alone(dtype: torch.dtype) -> None:
    slot = Slot((2,), torch.complex64)
    assert schema.complaint({"exp_avg": torch.zeros(2, dtype=dtype)}, "exp_avg", slot) is None
    assert schema.complaint({"exp_avg": torch.zeros(2)}, "exp_avg", slot) is not None


def test_a_loaded_state_is_a_copy_of_the_declared_kind() -> None:
    saved = state(exp_avg=torch.ones(2, 3, dtype=torch.bfloat16), mine=torch.zeros(1), left=0, step=4)
    loaded = schema.checked(saved, SLOTS, "w", CPU)
    assert loaded["exp_avg"].dtype == torch.float32 and loaded["exp_avg"].eq(1).all()
    assert loaded["left"] is False and loaded["step"] == 4 and loaded["mine"].dtype == torch.float32
    for key, value in saved.items():
        assert not isinstance(value, Tensor) or value.data_ptr() != loaded[key].data_ptr()
    with pytest.raises(ValueError, match=r"'momentum' of w is torch.float32 of shape \(1,\), expected nothing"):
        schema.checked({**saved, "momentum": torch.zeros(1)}, SLOTS, "w", CPU)


def test_a_basis_lies_column_after_column_however_it_was_saved() -> None:
    """Else a resumed run would sum in another order than the one that was cut off."""
    slots: Slots = {"basis": Slot((2, 5, 3), torch.float32, by_columns=True)}
    made: dict[str, Any] = {}
    schema.allocate_(made, slots, CPU)
    saved = {"basis": torch.randn(2, 5, 3)}
    loaded = schema.checked(saved, slots, "w", CPU)
    assert made["basis"].stride() == loaded["basis"].stride() == (15, 1, 5)
    assert torch.equal(loaded["basis"], saved["basis"])
    schema.allocate_(made, slots, torch.device("meta"))
    assert made["basis"].is_contiguous()


def test_numbers_of_an_older_version_follow_from_the_slots() -> None:
    saved = state(step=4)
    del saved["seed"], saved["left"]
    loaded = schema.checked(saved, SLOTS, "w", CPU)
    assert loaded["seed"] == 3 and loaded["left"] is False
    del saved["step"]
    with pytest.raises(ValueError, match="'step' of w is nothing"):
        schema.checked(saved, SLOTS, "w", CPU)


def test_zeros_stand_for_what_is_absent() -> None:
    assert {key: value.tolist() for key, value in schema.absent(state(), SLOTS).items()} == {"pending": [0.0] * 4}
    # What else is missing is none of its business.
    assert schema.absent({}, SLOTS).keys() == {"pending"}
    under_way = state(pending=torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert schema.absent(under_way, SLOTS) == {}
    assert "pending" in schema.checked(under_way, SLOTS, "w", CPU)
    assert "pending" not in schema.checked(state(pending=torch.zeros(4)), SLOTS, "w", CPU)


def fitted(found: dict[str, Any], slots: Slots, before: Slots | None = None) -> tuple[bool, dict[str, Any]]:
    return schema.fit_(found, slots, CPU, before), found


def test_a_state_that_fits_stays() -> None:
    moment = torch.ones(2, 3)
    rebuilt, found = fitted(state(exp_avg=moment, step=4, mine=1), SLOTS, SLOTS)
    assert not rebuilt and found["exp_avg"] is moment and found["step"] == 4 and found["mine"] == 1
    rebuilt, found = fitted(state(exp_avg=moment.bfloat16(), step=4), SLOTS, SLOTS)
    assert not rebuilt and found["exp_avg"].dtype == torch.float32 and found["exp_avg"].eq(1).all()


def test_a_state_that_does_not_fit_begins_anew() -> None:
    for changes in ({"exp_avg": torch.ones(5)}, {"momentum": torch.ones(1)}, {"left": True}):
        rebuilt, found = fitted(state(**{"step": 4, "seed": 9, "mine": 1, **changes}), SLOTS, SLOTS)
        assert rebuilt and found["step"] == 0 and found["seed"] == 9 and found["mine"] == 1
        assert found["exp_avg"].eq(0).all() and found["left"] is False and "momentum" not in found


def test_a_number_follows_its_option_where_that_changes() -> None:
    gap = {**SLOTS, "gap": Number(5)}
    _, found = fitted(state(step=4), gap, SLOTS)
    assert found["gap"] == 5
    # Grown meanwhile, and the option is the same.
    _, found = fitted(state(step=4, gap=20), gap, gap)
    assert found["gap"] == 20
    _, found = fitted(state(step=4, gap=20), {**SLOTS, "gap": Number(7)}, gap)
    assert found["gap"] == 7 and found["step"] == 4
    # Nothing is known of before, as after loading.
    _, found = fitted(state(step=4, gap=20), {**SLOTS, "gap": Number(7)})
    assert found["gap"] == 20
    # A fixed one means another state.
    rebuilt, found = fitted(state(step=4), {**SLOTS, "left": Number(True, fixed=True)}, SLOTS)
    assert rebuilt and found["left"] is True and found["step"] == 0


def test_the_correction_of_a_weight_comes_and_goes_by_itself() -> None:
    with_correction = {**SLOTS, "weight_correction": Slot((2, 3), torch.int8)}
    rebuilt, found = fitted(state(step=4), with_correction, SLOTS)
    assert not rebuilt and found["step"] == 4 and found["weight_correction"].dtype == torch.int8
    kept = torch.ones(2, 3, dtype=torch.int8)
    rebuilt, found = fitted(state(step=4, weight_correction=kept), with_correction, with_correction)
    assert not rebuilt and found["weight_correction"] is kept
    rebuilt, found = fitted(state(step=4, weight_correction=kept), SLOTS, with_correction)
    assert not rebuilt and "weight_correction" not in found
    # What is rebuilt keeps it: it belongs to the weight.
    rebuilt, found = fitted(state(weight_correction=kept, left=True), with_correction, with_correction)
    assert rebuilt and found["weight_correction"] is kept


def test_names_say_whose_state_it_is() -> None:
    ours = [{"params": [0, 0], "param_names": ["a", "b"]}, {"params": [0], "param_names": ["c"]}]
    saved = [{"params": [0, 1], "param_names": ["c", "a"]}, {"params": [2], "param_names": ["b"]}]
    assert schema.match_names(ours, saved) == [[1, 2], [0]]
    bare = [{"params": [0, 1]}, {"params": [2], "param_names": ["b"]}]
    assert schema.match_names(ours, bare) == schema.match_names(bare, saved) == [[0, 1], [2]]
    saved[1]["param_names"] = ["x"]
    with pytest.raises(ValueError, match="it lacks 'b'"):
        schema.match_names(ours, saved)
    with pytest.raises(ValueError, match="it has 'x'"):
        schema.match_names(ours, [*({**g, "param_names": ["c", "a"]} for g in saved[:1]),
                                  {"params": [2, 3], "param_names": ["b", "x"]}])  # fmt: skip
