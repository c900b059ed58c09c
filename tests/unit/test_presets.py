"""Presets against the totals that their publishers state, and by the names that people have for them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes_of_parts import parameters

from estimator.describe import presets as presets_module
from estimator.describe.catalogue import squash
from estimator.describe.checks import ConfigError, shown
from estimator.describe.model import ModelConfig
from estimator.describe.presets import preset, preset_groups, presets, published_parameters

HF = Path(__file__).parents[1] / "data" / "hf"

# The first presets' totals of the safetensors files on the hub, written here a second time: the data file must not be
# its own judge.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "cs336-tinystories": 4 * (4 * 512**2 + 3 * 512 * 1344 + 2 * 512) + 2 * 10_000 * 512 + 512,
}


@pytest.mark.parametrize("name", presets())
def test_parameters_are_the_published_total(name):
    counted = parameters(preset(name))
    assert counted == PUBLISHED.get(name, counted)
    assert published_parameters(name) == (None if name == "cs336-tinystories" else counted)


def test_each_preset_is_a_row_of_the_files_and_has_the_total_that_its_publisher_states():
    rows = [
        json.loads(line) for file in ("configs", "more") for line in (HF / f"{file}.jsonl").read_text().splitlines()
    ]
    totals = {row["published"] for row in rows if row.get("published")}
    entries = presets_module._entries()
    assert len(entries) >= 60
    for name, entry in entries.items():
        assert entry["source"], name
        assert entry["date"], name
        assert name == "cs336-tinystories" or entry["counted_by"] in ("publisher", "transformers")
        if entry.get("counted_by") == "publisher":
            assert entry.get("published", entry["parameters"]) in totals, name


def test_groups_hold_every_preset_once():
    grouped = [name for names in preset_groups().values() for name in names]
    assert sorted(grouped) == sorted(presets())
    assert "gemma-2-9b" in preset_groups()["Gemma"]


def test_one_preset_is_read_without_the_others(monkeypatch):
    read = []
    monkeypatch.setattr(presets_module, "read_config", read.append)
    preset("mixtral-8x7b")
    assert len(read) == 1


def test_tinystories_is_the_assignments_model():
    assert preset("cs336-tinystories") == ModelConfig(
        family="llama",
        num_layers=4,
        d_model=512,
        num_heads=16,
        d_ff=1344,
        vocab_size=10_000,
        context_length=256,
        tie_embeddings=False,
    )


@given(st.sampled_from(presets()), st.sampled_from(["-", "_", " ", ""]), st.booleans())
def test_a_preset_is_found_in_any_spelling(name, joint, upper):
    spelled = name.replace("-", joint)
    assert preset(spelled.upper() if upper else spelled) == preset(name)


@pytest.mark.parametrize(
    ("hub", "name"),
    [
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("GPT-2 XL", "gpt2-xl"),
        ("gpt2_small", "gpt2"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("Llama-2-7b-chat-hf", "llama-2-7b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
    ],
)
def test_the_hubs_name_is_understood(hub, name):
    assert preset(hub) == preset(name)


def test_no_two_presets_share_a_spelling():
    owner = {}
    for name, entry in presets_module._entries().items():
        for full in (name, *entry["aliases"], *entry["hub"]):
            for spelling in (full, full.split("/")[-1]):
                assert owner.setdefault(squash(spelling), name) == name


@pytest.mark.parametrize(
    ("wrong", "near"), [("gpt2-xxl", "gpt2-xl"), ("llama3-7b", "llama-3-8b"), ("mistral", "mistral-7b")]
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong, near):
    with pytest.raises(
        ConfigError,
        match=rf"model = '{wrong}': did you mean .*{near}.*\? allowed are the \d+ names that `estimate list`",
    ):
        preset(wrong)
    with pytest.raises(ConfigError, match="did you mean"):
        published_parameters(wrong)


def model_or_error(read, source):
    try:
        return read(source)
    except ConfigError as error:
        return str(error)


@given(st.text())
def test_any_text_is_a_preset_or_one_clear_error(text):
    result = model_or_error(preset, text)
    assert isinstance(result, ModelConfig) or result.startswith(f"model = {shown(text)}: ")
