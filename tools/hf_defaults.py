"""Write estimator/data/hf_defaults.json: what each configuration class of transformers takes where a file is silent.

Run with transformers installed: `python tools/hf_defaults.py`. Nothing is downloaded: classes are built of nothing.
"""

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

import transformers
from hub_defaults import OF_THE_HUB
from transformers import CONFIG_MAPPING

from estimator.describe.families import FAMILIES, SAME_CLASS

OUT = Path(__file__).parents[1] / "estimator" / "data" / "hf_defaults.json"
# Neither sizes nor parts: rates of dropout, epsilons, ids of tokens, initialization, labels, caches.
IGNORED = re.compile(
    r"dropout|pdrop|_eps$|epsilon|token_id|initializer|init_|summary|pretraining_tp|use_cache|label|chunk_size_feed|"
    r"return_dict|output_|dtype|problem_type|architectures|name_or_path|transformers_version|aux_loss|jitter|rope_theta|"
    r"rope_param|layerdrop|is_encoder|task_specific|z_loss|_scaling_beta|base_model|_attn_impl|mtp|nextn|scale_attention_"
)
# Names that older files use for the same thing, beside those that the class itself maps.
OLDER = {
    "gpt2": {"n_ctx": "n_positions"},
    "falcon": {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"},
    "mpt": {"max_position_embeddings": "max_seq_len"},
    "gpt_neox": {"rotary_pct": "partial_rotary_factor"},
    "bloom": {"max_position_embeddings": "seq_length"},
}
# What the class does not hold: the length that BLOOM was trained with (its positions have no limit), and a field that
# MiniMax-M2's class takes from published files only.
BESIDE = {"bloom": {"seq_length": 2048}, "minimax_m2": {"rotary_dim": None}}


def entry(kind):
    if kind in OF_THE_HUB:
        return dict(zip(("class", "also", "defaults"), OF_THE_HUB[kind], strict=True))
    cls = CONFIG_MAPPING[SAME_CLASS.get(kind, kind)]
    built = cls()
    also = {**cls.attribute_map, **OLDER.get(SAME_CLASS.get(kind, kind), {})}
    own = {}
    for field in fields(cls):
        if (
            IGNORED.search(field.name)
            or field.name.startswith("_")
            or field.name in ("model_type", "ignore_keys_at_rope")
        ):
            continue
        default = field.default if field.default is not MISSING else field.default_factory()
        if isinstance(default, (bool, int, float, str, type(None))):
            own[also.get(field.name, field.name)] = default
    for nested in ("attn_config", "ffn_config"):
        if getattr(built, nested, None) is not None:
            own[nested] = getattr(built, nested).to_diff_dict() | {
                f.name: getattr(getattr(built, nested), f.name)
                for f in fields(getattr(built, nested))
                if isinstance(getattr(getattr(built, nested), f.name), (bool, int, float, type(None)))
                and not IGNORED.search(f.name)
            }
            own[nested].pop("model_type", None)
            own[nested].pop("transformers_version", None)
    rope = getattr(built, "rope_parameters", None) or {}
    if "partial_rotary_factor" in rope:
        own["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return {"class": cls.__name__.removesuffix("Config"), "also": also, "defaults": own | BESIDE.get(kind, {})}


def main():
    source = f"transformers {transformers.__version__}: the fields of each configuration class and its attribute_map"
    families = {kind: entry(kind) for kind in sorted(FAMILIES)}
    lines = ",\n".join(f"{json.dumps(kind)}: {json.dumps(found)}" for kind, found in families.items())
    OUT.write_text(f'{{"source": {json.dumps(source)},\n{lines}}}\n')


if __name__ == "__main__":
    main()
