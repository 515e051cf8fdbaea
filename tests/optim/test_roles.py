"""What a parameter is, over many architectures: no embedding, head, router or norm is compressed, nearly all else is.

``python -c "from tests.optim.test_roles import table; print(table())"`` prints what becomes of each.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lowrank_optim import GaLoreAdamW, low_rank_groups
from lowrank_optim.nn import LowRank, convert
from lowrank_optim.optim.roles import HIDDEN, Role, describe, role_of_name, roles

transformers: Any = pytest.importorskip("transformers")

WORDS = 96
LLAMA = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
VIT = {key: value for key, value in BERT.items() if "vocab" not in key and "position" not in key}
GPT = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Case(NamedTuple):
    """An architecture, and by hand what in it is what.

    ``hidden`` matches the names of what has two or more dimensions and is a hidden matrix; ``heads`` are the names of
    heads that are not tied to an embedding; ``routers`` and ``others`` match what must stay beside them.
    """

    model: str
    config: str
    options: dict[str, Any]
    hidden: str
    heads: tuple[str, ...] = ()
    routers: str | None = None
    others: str | None = None


DECODER = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight"
EXPERTS = r"model\.layers\.\d+\.(self_attn\.\w+\.weight|mlp\.experts\.(gate_up|down)_proj|mlp\.shared_experts?\..*)"
GPT_LAYERS = r"transformer\.h\.\d+\.\w+\.\w+\.weight"
BERT_LAYERS = r"\w+\.encoder\.layer\.\d+\..*dense\.weight|\w+\.encoder\.layer\.\d+\.attention\.self\.\w+\.weight"
T5_LAYERS = r"\w+\.block\.\d+\.layer\.\d+\.(\w+Attention|\w+Dense)\.\w+\.weight"
BART_LAYERS = r"model\.\w+\.layers\.\d+\.(\w+\.\w+_proj|fc\d)\.weight"
LM = ("lm_head.weight",)

CASES = {
    "llama": Case("LlamaForCausalLM", "LlamaConfig", LLAMA, DECODER, LM),
    "llama, classifier": Case(
        "LlamaForSequenceClassification", "LlamaConfig", {**LLAMA, "num_labels": 3}, DECODER, ("score.weight",)
    ),
    "llama, tied": Case("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, DECODER),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8}, DECODER, LM),
    "gemma3": Case("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 8}, DECODER),
    "mistral": Case("MistralForCausalLM", "MistralConfig", LLAMA, DECODER, LM),
    "mixtral": Case(
        "MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 4}, EXPERTS, LM, r".*\.mlp\.gate\.weight"
    ),
    "qwen3 moe": Case(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**LLAMA, **MOE, "moe_intermediate_size": 24, "head_dim": 8},
        EXPERTS, LM, r".*\.mlp\.gate\.weight",
    ),
    "gpt-oss": Case(
        "GptOssForCausalLM", "GptOssConfig", {**LLAMA, "num_local_experts": 4, "head_dim": 8},
        EXPERTS, LM, r".*\.router\.weight", r".*_bias",
    ),
    "gpt-2": Case("GPT2LMHeadModel", "GPT2Config", GPT, GPT_LAYERS),
    "gpt-neox": Case(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", BERT, r"gpt_neox\.layers\.\d+\.(attention|mlp)\.\w+\.weight", LM
    ),
    "opt": Case(
        "OPTForCausalLM", "OPTConfig",
        {"vocab_size": WORDS, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "word_embed_proj_dim": 16},
        r"model\.decoder\.layers\.\d+\.(self_attn\.\w+|fc\d)\.weight|model\.decoder\.project_(in|out)\.weight",
    ),
    "bloom": Case(
        "BloomForCausalLM", "BloomConfig", {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        GPT_LAYERS,
    ),
    "falcon": Case(
        "FalconForCausalLM", "FalconConfig",
        {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, GPT_LAYERS,
    ),
    "phi": Case("PhiForCausalLM", "PhiConfig", {**LLAMA, "num_key_value_heads": 4},
                r"model\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight", LM),
    "t5": Case("T5ForConditionalGeneration", "T5Config", T5, T5_LAYERS),
    "t5, gated": Case(
        "T5ForConditionalGeneration", "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"}, T5_LAYERS,
    ),
    "bart": Case("BartForConditionalGeneration", "BartConfig", BART, BART_LAYERS),
    "bart, classifier": Case(
        "BartForSequenceClassification", "BartConfig", BART, BART_LAYERS, ("classification_head.out_proj.weight",)
    ),
    "bert": Case("BertForMaskedLM", "BertConfig", BERT, BERT_LAYERS),
    "bert, untied": Case("BertForMaskedLM", "BertConfig", {**BERT, "tie_word_embeddings": False}, BERT_LAYERS,
                         ("cls.predictions.decoder.weight",)),
    "bert, pretraining": Case("BertForPreTraining", "BertConfig", BERT, BERT_LAYERS, ("cls.seq_relationship.weight",)),
    "bert, spans": Case("BertForQuestionAnswering", "BertConfig", BERT, BERT_LAYERS, ("qa_outputs.weight",)),
    "roberta": Case("RobertaForMaskedLM", "RobertaConfig", BERT, BERT_LAYERS),
    "roberta, classifier": Case(
        "RobertaForSequenceClassification", "RobertaConfig", {**BERT, "num_labels": 7}, BERT_LAYERS,
        ("classifier.out_proj.weight",),
    ),
    "deberta": Case(
        "DebertaV2ForMaskedLM", "DebertaV2Config",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}, BERT_LAYERS,
    ),
    "modernbert": Case(
        "ModernBertForMaskedLM", "ModernBertConfig", {**BERT, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
        r"model\.layers\.\d+\.(attn|mlp)\.\w+\.weight",
    ),
    "vit": Case(
        "ViTForImageClassification", "ViTConfig", {**VIT, "image_size": 32, "patch_size": 8, "num_labels": 10},
        r"vit\.(encoder\.layer|layers)\.\d+\..*\.weight", ("classifier.weight",), others=r"vit\.embeddings\..*",
    ),
    "whisper": Case(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**BART, **SPECIAL, "decoder_start_token_id": 1, "num_mel_bins": 8, "max_source_positions": 32}, BART_LAYERS,
    ),
    "mamba": Case(
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        r"backbone\.layers\.\d+\.mixer\.\w+_proj\.weight", others=r".*\.A_log",
    ),
    "mamba 2": Case(
        "Mamba2ForCausalLM", "Mamba2Config",
        {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8,
         "head_dim": 8, "n_groups": 1},
        r"backbone\.layers\.\d+\.mixer\.\w+_proj\.weight", LM,
    ),
    "switch": Case(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {**T5, "num_experts": 4},
        r"\w+\.block\.\d+\.layer\.\d+\.(\w+Attention|mlp(\.experts\.expert_\d)?)\.\w+\.weight",
        routers=r".*\.router\.classifier\.weight",
    ),
    "deepseek v3": Case(
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_group": 2,
         "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
         "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8},
        EXPERTS + r"|model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight", LM, r".*\.mlp\.gate\.weight",
    ),
    "gemma 3n": Case(
        "Gemma3nForCausalLM", "Gemma3nTextConfig",
        {**LLAMA, "head_dim": 8, "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0,
         "vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 8,
         "activation_sparsity_pattern": [0.0, 0.0]},
        DECODER + r"|model\.layers\.\d+\.(laurel|altup)\.(linear|correction|prediction)_\w+\.weight",
        routers=r".*\.modality_router\.weight",
    ),
    "swin": Case(
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
         "num_labels": 10},
        r"swin\.encoder\.layers\.\d+\.blocks\.\d+\..*\.weight", ("classifier.weight",),
        others=r".*relative_position_bias_table",
    ),
}  # fmt: skip


def build(case: Case) -> Any:
    for name in (case.model, case.config):
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if transformers.__version__ < "5" and case in (CASES["mixtral"], CASES["gpt-neox"], CASES["swin"]):
        pytest.skip(f"transformers {transformers.__version__} has other names, or takes no meta device")
    with torch.device("meta"):
        return getattr(transformers, case.model)(getattr(transformers, case.config)(**case.options))


class Truth(NamedTuple):
    """The names of what must stay full-rank, and of the hidden matrices."""

    kept: set[str]
    hidden: set[str]


def truth(model: nn.Module, case: Case) -> Truth:
    """From the table, and from the types of the modules that hold a parameter."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(module)
    full = (nn.Embedding, nn.LayerNorm, nn.Conv1d, nn.Conv2d)
    named = dict(model.named_parameters())
    kept = {name for name, p in named.items() if p.ndim < 2 or any(isinstance(m, full) for m in owners[id(p)])}
    kept |= set(case.heads)
    for pattern in (case.routers, case.others):
        found = {name for name in named if pattern is not None and re.fullmatch(pattern, name)}
        assert found or pattern is None
        kept |= found
    hidden = {name for name, p in named.items() if p.ndim > 1 and re.fullmatch(case.hidden, name)} - kept
    assert hidden and kept <= set(named)
    return Truth(kept, hidden)


def compressed(groups: list[dict[str, Any]]) -> set[str]:
    return {name for group in groups if group.get("rank", 4) is not None for name in group["param_names"]}


def share(model: nn.Module, taken: set[str], hidden: set[str]) -> float:
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(sizes[name] for name in taken & hidden) / sum(sizes[name] for name in hidden)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_hidden_matrix_of_a_transformer_is_taken_and_nothing_else(case: Case) -> None:
    model = build(case)
    kept, hidden = truth(model, case)
    groups = low_rank_groups(model, rank=4)
    taken = compressed(groups)
    assert not taken & kept
    assert share(model, taken, hidden) > 0.9
    assert [len(group["param_roles"]) for group in groups] == [len(group["params"]) for group in groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_names_alone_say_the_same(case: Case) -> None:
    model = build(case)
    kept, hidden = truth(model, case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = compressed(GaLoreAdamW(model.named_parameters(), rank=1).param_groups)
    assert not taken & kept
    assert share(model, taken, hidden) > 0.9


def table() -> str:
    """What is compressed of each architecture, and what matrices are not, as Markdown."""
    lines = ["| architecture | hidden matrices compressed | kept | full-rank matrices |", "|---|---:|---:|---|"]
    for name, case in CASES.items():
        model = build(case)
        kept, hidden = truth(model, case)
        taken = compressed(low_rank_groups(model, rank=4))
        roles_of = roles(model)
        rest = {
            re.sub(r"\d+", "N", n): roles_of[n] for n, p in model.named_parameters() if p.ndim > 1 and n not in taken
        }
        matrices = ", ".join(f"`{n}` ({describe(role)})" for n, role in rest.items())
        lines.append(
            f"| {name} | {share(model, taken, hidden):.0%} | {len(kept - taken)} of {len(kept)} | {matrices} |"
        )
    return "\n".join(lines)


class Layer(nn.Module):
    def __init__(self, width: int = 16, inner: int = 24) -> None:
        super().__init__()
        self.wq = nn.Linear(width, width)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.before = nn.LayerNorm(width)


def model_of(**modules: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def layers(number: int = 2, **sizes: int) -> nn.ModuleList:
    return nn.ModuleList(Layer(**sizes) for _ in range(number))


def kinds(model: nn.Module, name: str) -> set[Role]:
    """The roles of the parameters of two or more dimensions of a module."""
    found = roles(model)
    return {found[n] for n, p in model.named_parameters() if p.ndim > 1 and n.startswith(name)}


def test_torchtitan_names() -> None:
    model = model_of(
        tok_embeddings=nn.Embedding(40, 16), layers=nn.ModuleDict({"0": Layer(), "1": Layer()}), norm=nn.RMSNorm(16),
        output=nn.Linear(16, 40, bias=False),
    )  # fmt: skip
    assert kinds(model, "layers") == {"matrix"}
    assert roles(model)["output.weight"] == "head" and roles(model)["tok_embeddings.weight"] == "embedding"
    assert {role_of_name(name, p) for name, p in model.named_parameters() if p.ndim > 1} == {
        "embedding", "matrix", "head"
    }  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("labels", [40, 5])
def test_a_head_with_an_odd_name(first: bool, labels: int) -> None:
    odd = {"to_symbols": nn.Linear(16, labels, bias=False)}
    rest = {"symbols": nn.Embedding(40, 16), "blocks": layers()}
    model = model_of(**{**odd, **rest} if first else {**rest, **odd})
    # One with neither the length of the vocabulary nor the last place looks as a hidden matrix does.
    assert kinds(model, "to_symbols") == {"matrix" if first and labels == 5 else "head"}
    assert kinds(model, "blocks") == {"matrix"} and kinds(model, "symbols") == {"embedding"}


def test_hidden_matrices_as_wide_as_the_vocabulary() -> None:
    model = model_of(tokens=nn.Embedding(24, 16), blocks=layers(inner=24), lm_head=nn.Linear(16, 24))
    assert kinds(model, "blocks") == {"matrix"} and kinds(model, "lm_head") == {"head"}
    # As many characters as the model is wide, and no repeated layers.
    model = model_of(tokens=nn.Embedding(16, 16), block=Layer(), lm_head=nn.Linear(16, 16))
    assert kinds(model, "block") == {"matrix"} and kinds(model, "lm_head") == {"head"}


def test_wrappers_do_not_hide_a_model() -> None:
    inner = model_of(shared=nn.Embedding(40, 16), blocks=layers(), output=nn.Linear(16, 40))
    expected = {name: role for name, role in roles(inner).items() if inner.get_parameter(name).ndim > 1}
    for prefix in ("module", "_orig_mod", "model.model", "0"):
        model = inner
        for part in reversed(prefix.split(".")):
            model = model_of(**{part: model})
        found = roles(model)
        assert {name: found[f"{prefix}.{name}"] for name in expected} == expected
        # A number is all that names alone know of a layer.
        by_name = {name: role_of_name(f"{prefix}.{name}", inner.get_parameter(name)) for name in expected}
        assert by_name == expected or prefix == "0"


def test_routers_beside_experts_and_gates_without() -> None:
    experts = nn.ModuleList(Layer() for _ in range(3))
    for name in ("gate", "switch", "router"):
        moe = model_of(**{name: nn.Linear(16, 3)}, experts=experts, shared_expert=Layer())
        model = model_of(blocks=nn.ModuleList([moe]))
        assert kinds(model, f"blocks.0.{name}") == {"router"}
        assert kinds(model, "blocks.0.experts") == kinds(model, "blocks.0.shared_expert") == {"matrix"}
    moe = model_of(experts=experts)
    moe.register_parameter("w_gate", nn.Parameter(torch.zeros(16, 3)))
    assert roles(model_of(blocks=nn.ModuleList([moe])))["blocks.0.w_gate"] == "router"
    # The gate of a SwiGLU: the tree tells it from a router, a name cannot.
    swiglu = model_of(gate=nn.Linear(16, 24), up=nn.Linear(16, 24), down=nn.Linear(24, 16))
    assert kinds(model_of(blocks=nn.ModuleList([swiglu])), "blocks.0.gate") == {"matrix"}
    assert role_of_name("layers.0.mlp.gate.weight", torch.zeros(24, 16)) == "router"
    assert role_of_name("layers.0.mlp.gate_proj.weight", torch.zeros(24, 16)) == "matrix"


def test_stacked_experts_and_their_biases() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(3, 24, 16))
            self.w1_bias = nn.Parameter(torch.zeros(3, 24))

    for name in ("experts", "grouped"):
        found = roles(model_of(**{name: Experts()}))
        assert found == {f"{name}.w1": "experts", f"{name}.w1_bias": "bias"}
    assert role_of_name("layers.1.moe.experts.w1", torch.zeros(3, 24, 16)) == "experts"
    assert role_of_name("layers.1.moe.grouped.w1", torch.zeros(3, 24, 16)) == "convolution"


def test_the_heads_of_an_attention_are_hidden() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(model_of(key=nn.Linear(16, 4), value=nn.Linear(16, 4)) for _ in range(4))
            self.output = nn.Linear(16, 16)

    model = model_of(tokens=nn.Embedding(40, 16), blocks=nn.ModuleList([Attention()]), heads=nn.Linear(16, 40))
    assert kinds(model, "blocks") == {"matrix"} and kinds(model, "heads") == {"head"}
    for name, p in model.named_parameters():
        if p.ndim > 1 and name.startswith("blocks"):
            assert role_of_name(name, p) == "matrix"


def test_modules_of_torch() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(16, 2, kdim=8, vdim=8), "lstm": nn.LSTM(16, 16),
            "scaled": weight_norm(nn.Linear(16, 24)), "conv": weight_norm(nn.Conv1d(16, 24, 3)),
            "plane": nn.LayerNorm((4, 16)), "bag": nn.EmbeddingBag(40, 16), "turned": nn.ConvTranspose2d(8, 8, 3),
        }
    )  # fmt: skip
    assert kinds(model, "attention") == kinds(model, "lstm") == {"matrix"}
    # The magnitudes of weight_norm are a column.
    assert kinds(model, "scaled") == {"matrix", "vector"} and kinds(model, "conv") == {"convolution", "vector"}
    assert kinds(model, "plane") == {"norm"} and kinds(model, "bag") == {"embedding"}
    assert kinds(model, "turned") == {"convolution"}


def test_what_a_model_calls_its_embeddings() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out, self.blocks = nn.Linear(40, 16), nn.Linear(16, 7), layers()

        def get_input_embeddings(self) -> nn.Module:
            return self.into

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    class Failing(Odd):
        def get_output_embeddings(self, language: str = "") -> nn.Module:
            raise LookupError(language)

    assert kinds(Odd(), "into") == {"embedding"} and kinds(Odd(), "out") == {"head"}
    assert kinds(Failing(), "into") == {"embedding"} and kinds(Failing(), "out") == {"matrix"}


def test_tied_weights_stand_once_and_stay() -> None:
    model = model_of(final=nn.Linear(16, 40, bias=False), blocks=layers(), symbols=nn.Embedding(40, 16))
    model.get_submodule("final").weight = model.get_submodule("symbols").weight
    assert roles(model)["final.weight"] == "embedding"
    low, full = low_rank_groups(model)
    assert full["param_names"].count("final.weight") == 1 and "final.weight" not in low["param_names"]


def test_factored_layers_are_compressed() -> None:
    model = model_of(tokens=nn.Embedding(40, 16), blocks=layers(), lm_head=nn.Linear(16, 40))
    convert(model, LowRank(rank=4))
    assert set(low_rank_groups(model)[0]["param_names"]) == {
        f"blocks.{i}.{name}.{part}" for i in (0, 1) for name in ("wq", "w1", "w3", "w2") for part in "AB"
    }


def named_llama(head: str, words: int, width: int, inner: int) -> Iterator[tuple[str, Tensor]]:
    """Shapes of a real size; the keys of grouped-query attention are 16 times as long as wide."""
    shapes = {
        "embed_tokens.weight": (words, width),
        f"{head}.weight": (words, width),
        "layers.0.attn.qkv.weight": (3 * width, width),
        "layers.0.attn.k.weight": (width // 16, width),
        "layers.0.mlp.up.weight": (inner, width),
        "layers.0.mlp.down.weight": (width, inner),
        "layers.0.norm.weight": (width,),
        "between.weight": (width, width),
    }
    return ((name, nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in shapes.items())


@pytest.mark.parametrize(("words", "width", "inner"), [(32000, 4096, 11008), (32000, 8192, 28672), (50257, 768, 3072)])
def test_a_head_whose_name_says_nothing_is_warned_of(words: int, width: int, inner: int) -> None:
    def make(head: str) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            GaLoreAdamW(named_llama(head, words, width, inner), rank=16)
        assert all(warning.filename == __file__ for warning in caught)
        return [str(warning.message) for warning in caught]

    assert make("lm_head") == make("output") == make("score") == []
    (message,) = make("to_symbols")
    assert message.startswith("to_symbols.weight: compressed by name") and "between" not in message


def test_toys_without_numbered_layers_are_not_warned_of() -> None:
    toy: dict[str, Callable[[], nn.Parameter]] = {
        "up": lambda: nn.Parameter(torch.zeros(300, 8)), "down": lambda: nn.Parameter(torch.zeros(8, 300))
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaLoreAdamW([(name, make()) for name, make in toy.items()], rank=4)


def test_every_role_has_words() -> None:
    words = [describe(role) for role in get_args(Role)]
    assert len(set(words)) == len(words) and set(get_args(Role)) > HIDDEN
