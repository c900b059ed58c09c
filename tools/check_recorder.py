"""Hold the recorder against real steps of other people's modules, and against the symbolic step, on this CPU.

    python tools/check_recorder.py transformers          # tiny configurations of transformers' own classes
    python tools/check_recorder.py transformers bert t5  # some of them
    python tools/check_recorder.py recipes 200           # our own models: random decoders and recipes, this many seeds

A row a case, in Markdown: the peak, the difference in bytes to the real step's (or the symbolic step's), how many
events there are and whether each is equal, and how many answers were assumed, which need not be the real ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch

import estimator as est
import trainer
from estimator.describe.checks import ConfigError
from trainer.referee.measure import build_step
from trainer.referee.recorder.builds import of_config
from trainer.referee.recorder.truth import judged

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "exact"))
from random_parts import draw  # noqa: E402 - a module of the tests

TOKENS = {"vocab_size": 200}
ENCODER = {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SEQUENCES = {
    **TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
IMAGES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
}
# Beside the decoders of tests/data/hf/tiny.jsonl: (class, fields of its config.json).
OTHERS = {
    "bert": ("BertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER),
    "t5": ("T5ForConditionalGeneration", {**TOKENS, "d_model": 64, "d_kv": 16, "num_heads": 4, "num_layers": 2,
                                          "d_ff": 96, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", {**SEQUENCES, "max_position_embeddings": 128}),
    "whisper": ("WhisperForConditionalGeneration", {**SEQUENCES, "max_source_positions": 60, "num_mel_bins": 16,
                                                    "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1,
                                                    "eos_token_id": 2, "decoder_start_token_id": 1}),
    "mamba": ("MambaForCausalLM", {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "vit": ("ViTForImageClassification", {**IMAGES, "patch_size": 8}),
    "swin": ("SwinForImageClassification", {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32,
                                            "window_size": 4, "patch_size": 2}),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
                                                "layer_type": "basic", "image_size": 32}),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2,
                                                    "image_size": 32}),
}  # fmt: skip


def configurations() -> Iterator[tuple[str, dict[str, object]]]:
    """(name, config.json) of each case."""
    for name, (architecture, sizes) in OTHERS.items():
        yield name, {"model_type": name, "architectures": [architecture], **sizes}
    for line in (ROOT / "tests/data/hf/tiny.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        yield case["name"].removeprefix("tiny "), case["config"]


def transformers(wanted: list[str]) -> bool:
    """The table of transformers' own classes; whether every peak is that of the real step."""
    print("| model | peak | difference | events | equal | assumed |\n|---|---:|---:|---:|---|---:|")
    equal = total = 0
    for name, config in configurations():
        if wanted and name not in wanted:
            continue
        total += 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(config), encoding="utf-8")
            try:
                truth = judged(of_config(path, 2, 40))
            except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the table
                print(f"| {name} | | {type(error).__name__}: {str(error).splitlines()[0][:120]} | | | |", flush=True)
                continue
        ours, real = truth.peak
        equal += ours == real
        same = "all" if truth.first is None else f"up to run {truth.first} of {len(truth.runs[1])}"
        assumed = sum(truth.recording.assumptions.values())
        print(f"| {name} | {real:,} | {ours - real:+,} | {truth.events[1]:,} | {same} | {assumed} |", flush=True)
    print(f"\n{equal} of {total} peaks are equal.")
    return equal == total


def recipes(count: int) -> bool:
    """Random decoders and recipes of ours: the recorder and the symbolic step; whether all peaks are equal."""
    equal = total = 0
    for seed in range(count):
        m, p = draw(Random(seed))  # noqa: S311 - no secret
        try:
            values = est.account(m, p, device="cpu").evaluate(m, p)
            recording = trainer.record(lambda m=m, p=p: build_step(m, p))
        except ConfigError as error:
            print(f"seed {seed}: {error}", flush=True)
            continue
        total += 1
        same = recording.peak_bytes == values.peak_bytes and recording.categories == dict(values.peak_categories)
        equal += same
        if not same:
            off = recording.peak_bytes - values.peak_bytes
            parts = {k: v - values.peak_categories[k] for k, v in recording.categories.items()}
            print(f"seed {seed}: {off:+,}, { ({k: v for k, v in parts.items() if v}) } {m!r} {p!r}", flush=True)
    print(f"{equal} of {total} are equal in the peak and in each of its categories.")
    return equal == total


def main() -> int:
    """The command; 0 if all are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("transformers").add_argument("names", nargs="*")
    what.add_parser("recipes").add_argument("count", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return 0 if (transformers(args.names) if args.what == "transformers" else recipes(args.count)) else 1


if __name__ == "__main__":
    sys.exit(main())
