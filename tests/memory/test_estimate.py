"""The estimate against real tensors of a small LLaMA, and against the closed form for LLaMA-7B."""

import json
import math

import pytest
import torch
from torch import nn

from lowrank_optim.memory.estimate import estimate, init_state_
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.simulate import simulate
from lowrank_optim.pretrain.build import DTYPES, build
from lowrank_optim.pretrain.llama import PRESETS, build_config, build_model
from lowrank_optim.pretrain.optimizers import accepted_arguments, build_optimizer, low_rank_names
from lowrank_optim.pretrain.sizes import tensor_bytes

# The odd feed-forward width leaves the last 256-element block of bitsandbytes partly filled.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 171,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}

METHODS = [
    ("GaLoreAdamW", {"rank": 16}),
    ("GaLoreAdamW", {"rank": 16, "proj_type": "reverse_std"}),
    ("GaLoreAdamW", {"rank": 64}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {}),
    ("Adafactor", {}),
    ("AdamW8bit", {}),
    ("Lion8bit", {}),
]


def save_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**SMALL, **changes}))
    return str(path)


def predict(model, name, args=None, dtype="fp32"):
    return estimate(Job(model=model, optimizer=name, optimizer_args=args or {}, dtype=dtype))


def train_one_step(config, name, args, dtype):
    model = build_model(build_config(config), dtype=DTYPES[dtype])
    optimizer = build_optimizer(name, model, lr=1e-3, args=args)
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.filterwarnings("ignore:.*compresses no parameter")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "args"), METHODS, ids=str)
def test_estimate_equals_a_stepped_optimizer_to_the_byte(tmp_path, name, args, dtype):
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    config = save_config(tmp_path)
    predicted = predict(config, name, args, dtype)
    model, optimizer = train_one_step(config, name, args, dtype)
    measured = tensor_bytes(model, optimizer)

    assert predicted.optimizer_by_key == measured["optimizer"]
    assert predicted.by_category["weights"] == measured["weights"]
    assert predicted.by_category["gradients"] == measured["gradients"]
    assert predicted.total_bytes == sum(predicted.by_category.values())

    # Independently of the counting function; tables that parameters share are told apart by their address.
    tensors = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    assert predicted.by_category["optimizer"] == sum(tensors.values())
    assert predicted.by_category["weights"] == sum(p.nbytes for p in model.parameters())
    assert predicted.parameters == sum(p.numel() for p in model.parameters())


def test_speed_options_do_not_change_the_estimate(tmp_path):
    config = save_config(tmp_path)
    plain = predict(config, "AdamW")
    for option in ("foreach", "fused", "capturable"):
        assert predict(config, "AdamW", {option: True}).by_category == plain.by_category


def test_tied_weights_count_once(tmp_path):
    untied = predict(save_config(tmp_path), "AdamW")
    config = save_config(tmp_path, tie_word_embeddings=True)
    tied = predict(config, "AdamW")
    head = SMALL["vocab_size"] * SMALL["hidden_size"]
    assert untied.by_category["weights"] - tied.by_category["weights"] == 4 * head
    assert untied.by_category["gradients"] - tied.by_category["gradients"] == 4 * head
    assert untied.optimizer_by_key["exp_avg"] - tied.optimizer_by_key["exp_avg"] == 4 * head
    measured = tensor_bytes(*train_one_step(config, "AdamW", {}, "fp32"))
    assert measured["weights"] == tied.by_category["weights"]


def test_a_view_counts_for_the_storage_that_it_pins():
    layer = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(layer.parameters())
    optimizer.state[layer.weight]["basis"] = torch.zeros(8, 8)[:, :2]
    assert tensor_bytes(layer, optimizer) == {"weights": 128, "gradients": 0, "optimizer": {"basis": 256}}


def test_buffers_of_the_state_dict_are_weights():
    norm = nn.BatchNorm1d(4)
    # weight, bias, mean and variance in fp32, one int64 counter
    assert tensor_bytes(norm, torch.optim.SGD(norm.parameters()))["weights"] == 4 * 4 * 4 + 8


def test_meta_initialisation_allocates_nothing_real():
    model = build_model(build_config("llama_9m"), device="meta")
    optimizer = build_optimizer("GaLoreAdamW", model, args={"rank": 16})
    init_state_(optimizer)
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)


def count_7b():
    """Parameters, embeddings with head and norms, and the (rows, columns) of the targeted matrices."""
    shape = PRESETS["llama_7b"]
    square, wide = (shape.hidden, shape.hidden), (shape.intermediate, shape.hidden)
    matrices = [square, square, square, square, wide, wide, wide] * shape.layers
    rest = 2 * shape.vocab * shape.hidden + (2 * shape.layers + 1) * shape.hidden
    return rest + sum(m * n for m, n in matrices), rest, matrices


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_adamw_closed_form_7b(dtype, size):
    total, _, matrices = count_7b()
    assert total == 6_738_415_616
    result = predict("llama_7b", "AdamW", {}, dtype)
    # torch keeps moments in the dtype of the parameter, and one fp32 step a tensor: matrices, norms, two tables
    tensors = len(matrices) + 2 * 32 + 1 + 2
    assert result.parameters == total
    assert result.by_category == {
        "weights": size * total,
        "gradients": size * total,
        "optimizer": 2 * size * total + 4 * tensors,
        "activations": 0,
        "other": 0,
    }
    assert result.not_included == ("activations", "other")
    assert result.low_rank_parameters == 0


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_galore_closed_form_7b(dtype, size):
    _, rest, matrices = count_7b()
    rank = 1024
    result = predict("llama_7b", "GaLoreAdamW", {"rank": rank}, dtype)
    low = sum(max(matrix) * rank for matrix in matrices)
    basis = sum(min(matrix) * rank for matrix in matrices)
    # Moments are fp32 whatever the weights are; bases are as the weights.
    assert result.optimizer_by_key == {
        "basis": size * basis,
        "exp_avg": 4 * (low + rest),
        "exp_avg_sq": 4 * (low + rest),
    }
    assert result.low_rank_parameters == sum(math.prod(matrix) for matrix in matrices)
    # Counts of elements for this model at this rank, in millions: published recomputations of the memory tables.
    assert [round(n / 1e6, 3) for n in (rest, result.low_rank_parameters, basis + 2 * low)] == [
        262.410,
        6476.005,
        4177.527,
    ]


def test_a_configuration_is_taken_as_it_is():
    config = build_config("llama_tiny")
    config.vocab_size = 500
    smaller, larger = (build(Job(optimizer="SGD"), "meta", config=given)[2] for given in (config, None))
    assert larger.num_parameters() - smaller.num_parameters() == 2 * (8192 - 500) * 256


def test_what_is_not_given_is_as_published():
    published = predict("llama_7b", "GaLoreAdamW", dtype="bf16")
    assert published.optimizer_args == {"rank": 1024, "update_proj_gap": 500, "scale": 0.25}
    assert published.by_category == predict("llama_7b", "GaLoreAdamW", {"rank": 1024}, "bf16").by_category


def sums_match(config, name, args, accumulate, dtype="fp32", per_layer=True):
    job = Job(
        model=config, optimizer=name, optimizer_args=args, seq_len=16, per_layer=per_layer, accumulate=accumulate,
        accumulate_dtype=dtype,
    )  # fmt: skip
    expected, peak = estimate(job), simulate(job)
    buffers = sum(buffer.nbytes for buffer in build(job, "meta")[2].buffers())
    found = {key: peak.most_by_category.get(key, 0) for key in ("weights", "gradients", "optimizer")}
    predicted = {key: expected.by_category[key] for key in found}
    if "update_norm" in expected.optimizer_by_key and found["optimizer"] != predicted["optimizer"]:
        # The last norm of a matrix may be there until a new one takes its place.
        predicted["optimizer"] += 4
    assert found == {**predicted, "weights": predicted["weights"] + buffers}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*reads whole gradients")
def test_sums_of_micro_batches_are_those_of_the_simulation(tmp_path):
    sums_match(save_config(tmp_path), "GaLoreAdamW", {"rank": 16}, 64, "bf16")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*reads whole gradients")
@pytest.mark.parametrize("accumulate", [1, 64])
@pytest.mark.parametrize("name", [*low_rank_names(), "AdamW", "AdamW8bit", "SGD"])
def test_every_method_takes_what_the_simulation_does(tmp_path, name, accumulate):
    own = name in low_rank_names()
    args = {"rank": 16} if own and name != "APOLLOMini" and "rank" in accepted_arguments(name) else {}
    config = save_config(tmp_path)
    sums_match(config, name, args, accumulate, per_layer=False)
    if own:
        for dtype in ("fp32", "bf16") if accumulate > 1 else ("fp32",):
            sums_match(config, name, args, accumulate, dtype)
    if name == "DCTAdamW":
        sums_match(config, name, {**args, "update_proj_gap": 2, "error_feedback": "none"}, accumulate)


def test_whole_sums_are_warned_of(tmp_path):
    config = save_config(tmp_path)
    with pytest.warns(UserWarning, match=r"FiraAdamW reads whole gradients.*0.000 GB"):
        expected = estimate(
            Job(model=config, optimizer="FiraAdamW", optimizer_args={"rank": 16}, per_layer=True, accumulate=2)
        )
    assert expected.gradients_by_kind["whole sums"] == expected.by_category["weights"]
