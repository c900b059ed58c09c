"""Why a config.json is not read: one sentence that names what it is, and the nearest thing that can be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from estimator.describe.catalogue import squash
from estimator.describe.checks import shown
from estimator.describe.fields import class_defaults

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# What there is beside text, by a field that says so.
BESIDE_TEXT = {
    "vision_config": "a vision part",
    "visual": "a vision part",
    "img_processor": "a vision part",
    "vision_tower": "a vision part",
    "mm_vision_tower": "a vision part",
    "audio_config": "an audio part",
    "audio_encoder": "an audio part",
    "speech_config": "an audio part",
}
TEXT = ("text_config", "llm_config", "language_config", "language_model_config", "thinker_config")

# What a decoder's blocks have that no part says, by the fields that say so: (fields, what it is).
BLOCKS = (
    (
        ("hybrid_override_pattern", "mamba_num_heads", "mamba_d_state", "mamba_n_heads"),
        "a hybrid, with mamba layers beside attention",
    ),
    (("ssm_cfg", "state_size", "ssm_state_size", "conv_kernel"), "a state-space model (mamba)"),
    (
        ("linear_num_value_heads", "linear_attn_config", "linear_key_head_dim"),
        "a hybrid, with linear attention in some layers",
    ),
    (("lru_width", "block_types"), "a hybrid, with recurrent blocks beside attention"),
    (("cross_attention_layers",), "a decoder whose layers look at another model's output (cross-attention)"),
    (("block_configs",), "a decoder whose blocks have sizes of their own each (block_configs)"),
)

# What a layer is that is no attention, by the names that lists of layers have for it.
LAYERS = {
    "mamba": "a hybrid, with mamba layers beside attention",
    "linear_attention": "a hybrid, with linear attention in some layers",
    "conv": "a hybrid, with convolutions beside attention",
    "recurrent": "a hybrid, with recurrent blocks beside attention",
}

# Types that their fields do not give away: what they are.
KINDS = {
    "an encoder, which predicts no next token": (
        "albert bert bert-generation big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra "
        "ernie esm eurobert flaubert funnel ibert layoutlm longformer luke megatron-bert mobilebert modernbert mpnet "
        "nystromformer rembert roberta roberta-prelayernorm roc_bert roformer splinter squeezebert xlm xlm-roberta "
        "xlm-roberta-xl xlnet xmod"
    ),
    "an encoder of images or sound": (
        "beit clip convnext deit dinov2 dinov3_vit hubert resnet siglip siglip2 swin vit wav2vec2 wavlm"
    ),
    "an encoder-decoder": (
        "bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe "
        "pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma trocr udop umt5"
    ),
    "a speech encoder-decoder": "moonshine seamless_m4t speech_to_text speecht5 whisper",
    "a state-space model (mamba)": "falcon_mamba mamba mamba2",
    "a recurrent model": "rwkv rwkv5 rwkv6 rwkv7 xlstm",
    "a hybrid, with mamba layers beside attention": ("bamba falcon_h1 jamba nemotron_h plamo2 zamba zamba2"),
    "a hybrid, with recurrent blocks beside attention": "recurrent_gemma",
    "a hybrid, with linear attention in some layers": (
        "kimi_linear minimax minimax_m1 minimax_text_01 olmo_hybrid qwen3_5 qwen3_5_moe qwen3_next bailing_hybrid"
    ),
    "a hybrid, with convolutions beside attention": "lfm2 lfm2_moe lfm3",
    "a model of text, images and sound": "gemma3n gemma4 phi4_multimodal qwen2_5_omni qwen3_omni_moe",
    "a model of text with a vision part": (
        "git idefics idefics2 idefics3 internvl kosmos-2 llava llava_next maira2 mistral3 mllama paligemma phi3_v "
        "pixtral qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe smolvlm"
    ),
}
IS = {kind: what for what, kinds in KINDS.items() for kind in kinds.split()}

# Decoders with a block of their own: (what no part says, the nearest family that is read).
GEMMA3 = "gemma3_text"
INDEXED = "an indexer picks the keys that a token sees"
LOOPED = "its layers run several times over in each step"
BOTH_WAYS = "it fills in a text from both sides, so that a token sees those after it"
CONVOLVED = "short convolutions stand beside its attention"
ONE_OFF = {
    "axk2": (INDEXED, "deepseek_v3"),
    "arctic": ("a dense feed-forward stands beside its experts", "mixtral"),
    "beam": ("what it adds to its stream is scaled by how deep the layer is", "qwen3_moe"),
    "cpmant": ("its scores have a bias by how far apart tokens are, which is learned", "llama"),
    "deepseek_v32": (INDEXED, "deepseek_v3"),
    "deepseek_v4": ("its stream is several streams side by side, and its keys are compressed", "deepseek_v3"),
    "diffllama": ("its attention is the difference of two", "llama"),
    "decilm": ("key/value heads differ between its layers", "llama"),
    "dory": (LOOPED, "qwen3"),
    "dots3_note_text": (INDEXED, "deepseek_v3"),
    "dream": (BOTH_WAYS, "qwen2"),
    "doge": ("its attention weighs keys with a mask that is learned", "llama"),
    "gemma3n_text": ("its stream is several streams side by side, and its layers have embeddings of their own", GEMMA3),
    "gemma4_text": ("keys, values and heads differ between its layers", GEMMA3),
    "gemma4_unified_text": ("keys, values and heads differ between its layers", GEMMA3),
    "gemma4_assistant": ("it drafts for another model, whose keys it looks at", GEMMA3),
    "gpt_neox_japanese": ("its last layer has a bias that the others have not", "gpt_neox"),
    "glm_moe_dsa": (INDEXED, "deepseek_v3"),
    "hrm_text": (LOOPED, "llama"),
    "hunyuan": ("some of its layers look at another layer's keys and values", "hunyuan_v1_moe"),
    "hy_v4": (INDEXED, "deepseek_v3"),
    "inkling_text": (CONVOLVED, "llama"),
    "inkling2_text": (CONVOLVED, "llama"),
    "inkling2_loop_text": (CONVOLVED, "llama"),
    "laguna": ("heads, and how much of one is rotated, differ between its layers", "glm4_moe"),
    "longcat_flash": ("a layer has two attentions, and experts that compute nothing", "deepseek_v3"),
    "llada": (BOTH_WAYS, "llama"),
    "minimax_m3_vl_text": (INDEXED, "minimax_m2"),
    "modernbert-decoder": (
        "a dense layer with a norm stands before its head, and its first block has no norm",
        "llama",
    ),
    "mimo": ("it predicts further tokens with a layer of its own", "qwen2"),
    "mimo_v2_flash": ("keys, values and heads differ between its layers", "gpt_oss"),
    "openelm": ("heads and feed-forwards differ between its layers", "llama"),
    "reformer": ("it finds keys by their hashes, and its layers are reversible", "gpt2"),
    "step3_text": ("its keys and values are of one head, of a rank of their own", "deepseek_v3"),
    "telechat": ("its keys and values are one projection, beside that of the queries", "llama"),
    "zaya": ("its keys go through convolutions, and a router hears the one before it", "qwen3_moe"),
    "qwen": ("it is the first Qwen, with code of its own", "qwen2"),
}
READ = "read are decoders that are attention and feed-forward throughout, such as llama"
# Objects that are no configuration of a model, by fields that say so.
OTHER_FILES = (
    (("peft_type",), "an adapter's configuration; ask about the model that it adapts, with adapter and adapter_rank"),
    (
        ("dim", "n_layers"),
        "Meta's or Mistral's own params.json; read is the config.json of the same weights on the hub",
    ),
    (("n_layer", "n_head", "n_embd"), 'a file with the fields of a gpt2; if it is one, give model_type "gpt2"'),
    (("zero_optimization",), "DeepSpeed's configuration; it says how a model is trained, not which"),
    (("distributed_type",), "Accelerate's configuration; it says how a model is trained, not which"),
    (("max_new_tokens",), "a file that says how text is generated; config.json lies beside it"),
    (("temperature",), "a file that says how text is generated; config.json lies beside it"),
    (("tokenizer_class",), "a tokenizer's configuration; config.json lies beside it"),
    (("weight_map",), "an index of weights; config.json lies beside it"),
)
# Heads that stand in the place of the vocabulary's, by the end of the class's name.
OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "RewardModel",
)
RENAMED = {"kimi_k2": "deepseek_v3"}  # the same model, down to the names of its fields
NEAREST = "the nearest that can be asked is"
AS_TEXT = "its text part alone can be asked by passing the object in"


def refusal(raw: Mapping[str, Any], families: Sequence[str]) -> str | None:
    """Why this file is not read; None if it is a decoder of one of `families`, and nothing else.

    A type that is in no list is taken for the family whose class `architectures` names (`built_of`), unless the file
    comes with code of its own.
    """
    kind = raw.get("model_type")
    taken = built_of(raw, families)
    if kind is None and taken is not None:
        kind = taken[1]
    if not isinstance(kind, str) or not kind:
        other = next((what for fields, what in OTHER_FILES if all(raw.get(field) for field in fields)), None)
        said = (
            f"this is {other}"
            if other
            else f"a configuration of transformers names its family here; {_allowed(families)}"
        )
        return f"model_type = {shown(kind)}: {said}"
    name = f"model_type = {shown(kind)}"
    text = next((field for field in TEXT if isinstance(raw.get(field), dict)), None)
    parts = dict.fromkeys(what for field, what in BESIDE_TEXT.items() if raw.get(field))
    if text is not None:
        inner = raw[text].get("model_type")
        beside = f"{' and '.join(parts)} beside the text ({', '.join(f for f in BESIDE_TEXT if raw.get(f))})"
        around = beside if parts else f"{IS.get(kind, 'another model')} around its {text}"
        alone = f"{AS_TEXT} {text} as the whole configuration"
        hint = alone if inner in families else f"{text} is {shown(inner)}, not read"
        return f"{name}: {around}, which would be lost; {hint}"
    if parts:
        return f"{name}: {' and '.join(parts)} beside the text, which would be lost; {NEAREST} a decoder of text alone"
    others = {field: x["model_type"] for field, x in raw.items() if isinstance(x, dict) and x.get("model_type")}
    if others:
        held = ", ".join(f"{field}: {shown(what)}" for field, what in others.items())
        return f"{name}: {IS.get(kind, 'a model made of others')} ({held}), which would be lost; {NEAREST} one of these"
    layers = raw.get("layer_types") or raw.get("layers_block_type")
    layers = [one for one in layers if isinstance(one, str)] if isinstance(layers, list) else []
    hybrid = next((LAYERS[one] for one in layers if one in LAYERS), None)
    if kind in families:
        return f"{name}: {hybrid}; {READ}" if hybrid else _other_head(raw)
    if kind in RENAMED:
        return f'{name}: the model is a {RENAMED[kind]} under a name of its own; give model_type "{RENAMED[kind]}"'
    if kind in ONE_OFF:
        why, nearest = ONE_OFF[kind]
        return f"{name}: {why}, which no part says; {NEAREST} {nearest} with the same sizes"
    what: str | None = IS.get(kind) or hybrid
    what = what or next((meant for fields, meant in BLOCKS if any(raw.get(f) for f in fields)), None)
    if what is None and (raw.get("is_encoder_decoder") or raw.get("encoder_layers")):
        what = "an encoder-decoder"
    if what is not None:
        return f"{name}: {what}; {READ}"
    if taken is not None and not raw.get("auto_map"):
        return None
    if taken is not None:
        return (
            f"{name}: code of its own (auto_map), which is never run, but architectures says {taken[0]}, the class of "
            f'{taken[1]}; if the model is built like that, give model_type "{taken[1]}"'
        )
    same = [family for family in families if squash(family) == squash(kind)]
    hint = f"did you mean {same[0]}? " if same else ""
    own = "code of its own (auto_map), which is never run; " if raw.get("auto_map") else ""
    return f"{name}: {own}{hint}{_allowed(families)}"


def _other_head(raw: Mapping[str, Any]) -> str | None:
    """Why a model with the blocks of a family, and another head, is not read."""
    said = raw.get("architectures")
    for cls in said if isinstance(said, list) else ():
        end = next((end for end in OTHER_HEADS if isinstance(cls, str) and cls.endswith(end)), None)
        if end is not None:
            return (
                f"architectures = {shown(said)}: {end} has a head of its own in the place of the vocabulary's; "
                f"{NEAREST} the same file without architectures, whose head is the vocabulary's"
            )
    return None


def _allowed(families: Sequence[str]) -> str:
    return (
        f"allowed are the {len(families)} families that `estimate list families` prints, such as llama, qwen3, mixtral"
    )


def built_of(raw: Mapping[str, Any], families: Sequence[str]) -> tuple[str, str] | None:
    """The class that `architectures` names, and its family; None where that is no family that is read."""
    said = raw.get("architectures")
    if isinstance(said, list):
        for family in families:
            if f"{class_defaults()[family]['class']}ForCausalLM" in said:
                return f"{class_defaults()[family]['class']}ForCausalLM", family
    return None
