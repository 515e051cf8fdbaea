"""The simulation against counts by hand, and its peak against what a real run allocates."""

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from lowrank_optim.memory.cli import main
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.measure import prepare, train_on_noise
from lowrank_optim.memory.simulate import UPDATES, simulate, two_parts_of_a_pass
from lowrank_optim.memory.tracker import Tracker
from lowrank_optim.ops import chunks
from lowrank_optim.ops.dct import add_dct2_
from lowrank_optim.ops.two_sided import sinkhorn_scales
from lowrank_optim.pretrain.build import build
from lowrank_optim.pretrain.optimizers import accepted_arguments, low_rank_names

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 171,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def test_categories_and_peak_by_hand():
    with FakeTensorMode(), Tracker() as tracker:
        weight = torch.empty(100, 100)
        tracker.label([weight], "weights")
        with tracker.during("forward", "first"):
            activation = torch.empty(1000)
            view = activation[10:].view(9, 110)
            gone = torch.empty(5000)
            del gone
        with tracker.during("update", "second"):
            state = torch.empty(300)
            temporary = activation + 1
            another = temporary * 2
            del temporary, another
        del activation
        peak = tracker.peak()
    # While both temporaries live: 100² + 1000 + 300 + 2 * 1000; with ``gone`` it was 100² + 6000.
    assert peak.peak_bytes == 4 * (10_000 + 1000 + 5000)
    assert (peak.phase, peak.layer) == ("forward", "first")
    del view, state


def test_an_update_that_peaks():
    with FakeTensorMode(), Tracker() as tracker:
        gradient = torch.empty(1000)
        tracker.label([gradient], "gradients")
        tracker.part("second")
        with tracker.during("update", "layer"):
            state = torch.empty(300)
            temporary = gradient + 1
            del temporary
            peak = tracker.peak()
    assert peak.by_category == {"weights": 0, "gradients": 4000, "optimizer": 1200, "activations": 0, "other": 4000}
    assert peak.by_layer == {"layer": 4000, "loss": 4000}
    assert (peak.update, peak.phase, peak.layer) == ("second", "update", "layer")
    del state


def test_values_read_on_the_host_are_one_and_masks_take_all():
    with FakeTensorMode(), Tracker():
        x = torch.zeros(3, 4)
        assert float(x.sum()) == 1.0
        assert bool(x.isfinite().all())
        assert int(torch.zeros(1, dtype=torch.int64)) == 1
        assert (x > 0).nonzero().shape == (12, 2)
        assert x[0][torch.zeros(4, dtype=torch.bool)].shape == (4,)


def test_what_is_alike_is_repeated():
    ran, states = [], [{"moment": torch.empty(0), "step": 0} for _ in range(4)]
    tables = {}

    def run(state):
        ran.append(state)
        # The first makes what the others find.
        tables.setdefault("basis", torch.empty(50))
        temporary = torch.empty(1000)
        state["moment"] = temporary[:10].clone()
        state["step"] += 1
        del temporary
        state["late"] = torch.empty(7)

    with FakeTensorMode(), Tracker() as tracker:
        for state in states:
            state["moment"] = torch.empty(10)
        for step in range(2):
            for state in states:
                with tracker.during("update", "layer"):
                    tracker.alike(("update", step), state, lambda state=state: run(state))
        peak = tracker.peak()
        assert [state["late"].shape for state in states] == [(7,)] * 4 and [state["step"] for state in states] == [
            2
        ] * 4
    # Two in the first round, of which the first one stands for itself, one in the second.
    assert len(ran) == 3
    # The moments before, the table, a new moment beside the old one, and what is made late.
    assert peak.peak_bytes == 4 * (4 * 10 + 50 + 1000 + 10 + 4 * 7)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("GaLoreAdamW8bit", {"per_layer": True, "accumulate": 3}),
        *(
            pytest.param(name, more, marks=pytest.mark.slow)
            for name in low_rank_names()
            for more in ({}, {"per_layer": True, "accumulate": 3}, {"per_layer": True, "weights": "int8"})
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*reads whole gradients")
def test_what_is_repeated_takes_what_it_takes_itself(name, more, small, monkeypatch):
    args = {"rank": 16} if name != "APOLLOMini" and "rank" in accepted_arguments(name) else {}
    job = Job(model=small, optimizer=name, optimizer_args=args, seq_len=16, **more)
    repeated = simulate(job)
    monkeypatch.setattr(Tracker, "alike", lambda self, key, state, run: run())
    assert simulate(job) == repeated


def test_layers_of_forward_and_backward():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4000))
    tracker = Tracker()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        tracker.watch(model)
        loss = model(torch.zeros(50, 8)).square().sum()
        with tracker.during("backward"):
            loss.backward()
        del loss
    peak = tracker.peak()
    # 50 x 4000 outputs, their squares' gradient and the gradient of the weight, 4000 x 8.
    assert peak.phase == "backward"
    assert peak.by_layer["2"] >= 4 * 50 * 4000
    assert peak.by_layer["loss"] >= 4 * 50 * 4000


FAST = {"GaLoreAdamW8bit", "AdamW"}
SLOW = ("GaLoreAdamW", "DCTAdamW", "APOLLOAdamW")
EACH = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in (*low_rank_names(), "AdamW", "SGD")
]


@pytest.mark.parametrize("name", EACH)
def test_what_stays_is_the_estimate(name, small):
    args = {"rank": 16} if "rank" in accepted_arguments(name) and name != "APOLLOMini" else {}
    job = Job(model=small, optimizer=name, optimizer_args=args, seq_len=16)
    peak, expected = simulate(job), estimate(job)
    # transformers keeps the frequencies of the positions out of the state dict.
    buffers = sum(buffer.nbytes for buffer in build(job, "meta")[2].buffers())
    assert peak.by_category["weights"] == expected.by_category["weights"] + buffers
    assert peak.by_category["gradients"] <= expected.by_category["gradients"]
    # Tables that all parameters share are in no state; within the first update not every state is made yet.
    assert peak.update == UPDATES[0] or expected.by_category["optimizer"] <= peak.by_category["optimizer"]
    assert simulate(job) == peak


def test_half_a_pass_has_the_shapes_of_a_whole_one():
    matrix = torch.ones(2000, 300)
    with two_parts_of_a_pass():
        assert len(list(chunks.chunks(matrix))) == 2
        rows, columns = sinkhorn_scales(matrix, 1)
    assert rows.shape == (2000, 1) and columns.shape == (1, 300)
    assert len(list(chunks.chunks(matrix))) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", low_rank_names())
def test_passes_of_many_parts_may_end_after_two(name, small, monkeypatch):
    job = Job(model=small, optimizer=name, seq_len=16)
    before = simulate(job).peak_bytes
    monkeypatch.setattr(chunks, "CHUNK", 256)
    assert simulate(job).peak_bytes <= before


def allocated(job):
    """Peak of what torch's CPU allocator hands out, by its own profile."""
    update = prepare(job, "cpu")
    model = update.model
    held = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(3):
            train_on_noise(update)
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return held + most


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize(
    "name", ["GaLoreAdamW8bit", "AdamW", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_the_peak_is_what_the_allocator_hands_out(name, dtype, small):
    args = {} if name == "AdamW" else {"rank": 16, "update_proj_gap": 2}
    job = Job(model=small, optimizer=name, optimizer_args=args, dtype=dtype, batch_size=2, seq_len=32)
    assert simulate(job).peak_bytes == pytest.approx(allocated(job), rel=0.05)


DEEP = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 5}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"per_layer": True, "accumulate": 64, "checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"per_layer": True}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"accumulate": 64}, marks=pytest.mark.slow),
        pytest.param({"per_layer": True, "weights": "int8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_few_layers_stand_for_all(tmp_path, more):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**SMALL, **DEEP}))
    job = Job(model=str(path), optimizer="GaLoreAdamW", optimizer_args={"rank": 8}, seq_len=16, batch_size=2, **more)
    few, whole = simulate(job), simulate(job, whole=True)
    assert few.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)
    assert few.most_by_category["optimizer"] == whole.most_by_category["optimizer"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*reads whole gradients")
@pytest.mark.parametrize("model", ["llama_130m", "llama_350m"])
@pytest.mark.parametrize("name", [*low_rank_names(), "AdamW"])
def test_few_layers_stand_for_all_of_a_preset(model, name):
    args = {"rank": 256} if name != "APOLLOMini" and "rank" in accepted_arguments(name) else {}
    for per_layer in (False, True) if name in low_rank_names() else (False,):
        job = Job(model=model, optimizer=name, optimizer_args=args, per_layer=per_layer)
        assert simulate(job).peak_bytes == pytest.approx(simulate(job, whole=True).peak_bytes, rel=0.01)


def test_checkpointing_leaves_the_inputs_of_the_layers(small):
    shape = {"batch_size": 8, "seq_len": 64}
    plain, less = (simulate(Job(model=small, optimizer="SGD", checkpointing=flag, **shape)) for flag in (False, True))
    assert less.by_category["activations"] < 0.7 * plain.by_category["activations"]


def test_no_tensor_without_data_stays_in_a_cache(small):
    simulate(Job(model=small, optimizer="DCTAdamW", optimizer_args={"rank": 16}, seq_len=16))
    transformed = torch.zeros(2, 64)
    add_dct2_(transformed, torch.ones(2, 64))
    assert torch.isfinite(transformed).all()


def test_command_line(small, capsys):
    line = [
        "simulate",
        "--model",
        small,
        "--optimizer",
        "GaLoreAdamW",
        "--optimizer-args",
        "rank=16",
        "--seq-len",
        "16",
    ]
    assert main([*line, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["peak_bytes"] == sum(answer["by_category"].values())
    assert list(answer["by_category"]) == ["weights", "gradients", "optimizer", "activations", "other"]
    assert main(line) == 0
    assert "The peak is in the" in capsys.readouterr().out
