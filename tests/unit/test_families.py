"""Every family against transformers: parameters, the shape of every tensor and FLOPs, of published and of tiny models.

Counted by `shapes_of_parts`, which shares no code with the accounts.
"""

import json
from collections import Counter, defaultdict
from math import prod
from pathlib import Path

import pytest
from shapes_of_parts import blocks, parameters, shapes

from estimator.describe.checks import ConfigError
from estimator.describe.families import FAMILIES
from estimator.describe.fields import class_defaults
from estimator.describe.hf import from_hf
from estimator.describe.hub import HUB

HF = Path(__file__).parents[1] / "data" / "hf"


def rows(file, *expected):
    found = [json.loads(line) for line in (HF / file).read_text().splitlines()]
    return [pytest.param(row, id=row["name"]) for row in found if row.get("expect") in expected]


@pytest.mark.parametrize("row", rows("configs.jsonl", "exact") + rows("more.jsonl", None))
def test_a_published_model_has_the_parameters_that_it_has_in_transformers(row):
    m = from_hf(row["config"])
    assert parameters(m) == (row["parameters"] or parameters(m))
    assert row.get("published") in (None, parameters(m), parameters(m) + corrections(m))


def corrections(m):
    """What routers add to their scores: buffers in transformers, tensors of the published files."""
    experts = m.made_of.experts
    if experts is None or experts.correction != "buffer":
        return 0
    return m.num_experts * sum(layer.sparse for layer in m.layers)


@pytest.mark.parametrize("row", rows("configs.jsonl", "refuse"))
def test_what_is_no_decoder_is_refused_by_what_it_is(row):
    with pytest.raises(ConfigError) as error:
        from_hf(row["config"])
    for word in row["must_mention"]:
        assert word in str(error.value).lower()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("row", rows("configs.jsonl", "exact-or-refuse"))
def test_a_block_that_no_part_says_is_never_a_wrong_number(row):
    with pytest.raises(ConfigError, match=f"model_type = '{row['family']}': .*which no part says; the nearest"):
        from_hf(row["config"])


def unified(row):
    """The shapes in transformers, where several tensors are one with us."""
    found, split = Counter(), defaultdict(list)
    for name, shape in row["tensors"].items():
        if ".norms." in name:  # StableLM has a module for the norm of each head
            split[name.split(".norms.")[0]].append(shape)
        elif row["family"] == "dbrx" and ".experts." in name:  # the experts' rows one below the other
            n = row["config"]["ffn_config"]["moe_num_experts"]
            split[name.rsplit(".", 1)[0]].append((n, shape[0] // n, shape[1]))
        elif name.endswith("moe_statics.e_score_correction_bias"):  # ERNIE's has a first dimension of 1
            found[tuple(shape[1:])] += 1
        else:
            found[tuple(sorted(shape))] += 1
    for parts in split.values():
        if row["family"] == "dbrx":
            n, f, d = parts[0]
            found[tuple(sorted((n, 2 * f, d)))] += 1
            found[tuple(sorted((n, f, d)))] += 1
        else:
            found[tuple(sorted((len(parts), *parts[0])))] += 1
    return found


@pytest.mark.parametrize("row", rows("tiny.jsonl", None))
def test_a_tiny_model_has_the_tensors_that_it_has_in_transformers(row):
    m = from_hf(row["config"])
    assert parameters(m) == row["parameters"]
    # GPT-2's matrices are stored transposed, as are the experts of some families: a shape is a set of sizes.
    assert Counter(tuple(sorted(shape)) for shape in shapes(m)) == unified(row)


def forward_flops(m, tokens, context):
    """Two FLOPs a weight of each matrix product and token, of an expert for each token that goes through it."""
    total = 0
    for block, layer in zip(blocks(m), m.layers, strict=True):
        own_norms = [(m.num_heads, m.e), (m.kv_heads, m.e)] if m.parts.attention.qk_norm == "head-own" else []
        biases = [(m.num_experts, 2 * m.d_expert), (m.num_experts, m.d_model)] if layer.sparse else []
        biases = biases if layer.sparse and m.parts.experts.bias else []
        for no_product in own_norms + biases:
            block.remove(no_product)
        for shape in block:
            if len(shape) == 2:
                total += 2 * tokens * prod(shape)
            if len(shape) == 3:
                every = m.parts.experts.score == "sigmoid-all"
                total += 2 * tokens * prod(shape[1:]) * (shape[0] if every else m.experts_per_token)
        total += 2 * tokens * context * m.num_heads * (m.e + m.value_e)
    around = m.vocab_size * m.embedding_width
    around += 2 * m.embedding_width * m.d_model if m.embedding_dim else 0
    return total + 2 * tokens * around


@pytest.mark.parametrize("row", rows("tiny.jsonl", None))
def test_a_tiny_model_has_the_flops_that_pytorch_counts(row):
    m, B, T = from_hf(row["config"]), row["batch_size"], row["seq_len"]
    counted = row["forward_flops"]
    if row["family"] == "falcon":  # whose own attention runs in a kernel that is not counted
        counted += m.num_layers * 2 * B * T * T * m.num_heads * 2 * m.e
    assert forward_flops(m, B * T, T) == counted


# Their classes came with their weights, and are in no transformers: judged by the totals that their publishers state.
OF_THE_HUB = set(HUB)


@pytest.mark.parametrize(
    ("d", "f", "h", "k", "layers", "published"),
    [(1536, 3840, 24, 8, 52, 1_247_442_432), (2304, 5760, 36, 36, 40, 2_442_057_984)],
)
def test_minicpm_has_the_parameters_of_its_paper(d, f, h, k, layers, published):
    """Hu et al. 2024 (arXiv:2404.06395), table 2, which counts all but the embedding."""
    sizes = {"hidden_size": d, "intermediate_size": f, "num_attention_heads": h, "num_key_value_heads": k}
    m = from_hf({"model_type": "minicpm", **sizes, "num_hidden_layers": layers, "vocab_size": 122_753})
    assert parameters(m) - 122_753 * d == published


def test_every_family_has_a_tiny_model_and_its_classs_defaults():
    tiny = {json.loads(line)["family"] for line in (HF / "tiny.jsonl").read_text().splitlines()}
    assert tiny == set(FAMILIES) - OF_THE_HUB
    assert {row.values[0]["config"]["model_type"] for row in rows("more.jsonl", None)} >= OF_THE_HUB
    assert set(class_defaults()) == {*FAMILIES, "source"}


def test_the_data_are_the_installed_classs_defaults():
    transformers = pytest.importorskip("transformers")
    if not class_defaults()["source"].startswith(f"transformers {transformers.__version__}:"):
        pytest.skip("another version of transformers")
    for kind in set(FAMILIES) - OF_THE_HUB:
        cls = type(transformers.CONFIG_MAPPING[kind]())
        entry = class_defaults()[kind]
        assert entry["class"] == cls.__name__.removesuffix("Config")
        built = cls()
        for field, default in entry["defaults"].items():
            if default is not None and not isinstance(default, dict) and hasattr(built, field):
                # Building the class takes back windows that are not in use, and counts from the end what is -1;
                # a width that is "auto" is of layers that are not read.
                resolved = field in ("sliding_window", "moe_layer_end_index", "mamba_d_head")
                assert getattr(built, field) == default or resolved, (kind, field)


def test_every_causal_language_model_of_transformers_is_read_or_said_to_be_what_it_is():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for kind in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES) - {"gemma4_assistant"}:  # that has no defaults
        config = transformers.CONFIG_MAPPING[kind]().to_dict() | {"model_type": kind}
        with pytest.raises(ConfigError, match=f"model_type = '{kind}': ") as error:
            from_hf(config)
        assert "allowed are the" not in str(error.value), kind
