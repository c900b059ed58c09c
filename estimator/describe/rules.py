"""How a family's entry reads a file: functions of its `Fields` to attributes of parts, sizes, and kinds of layers."""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt
from typing import TYPE_CHECKING, Any

from estimator.describe.catalogue import number as finite
from estimator.describe.checks import ConfigError, shown

if TYPE_CHECKING:
    from estimator.describe.fields import Fields

Rule = Callable[["Fields"], Any]


def yes(name: str) -> Rule:
    """Whether the file says so."""
    return lambda c: c.flag(name)


def size(name: str) -> Rule:
    """A positive integer."""
    return lambda c: c.size(name)


def number(name: str) -> Rule:
    """A finite number."""
    return lambda c: c.number(name)


def either(name: str, then: Any, other: Any) -> Rule:
    """One of two, by a flag."""
    return lambda c: then if c.flag(name) else other


def act(name: str) -> Rule:
    """An activation, by the name that files have for it."""
    return lambda c: c.activation(name)


def all_four(name: str) -> dict[str, Rule]:
    """Biases on q, k, v and the output projection, by one flag."""
    return {"bias": yes(name), "out_bias": yes(name)}


def cycle(*kinds: str) -> Rule:
    """Kinds of layers that repeat."""
    return lambda c: [kinds[i % len(kinds)] for i in range(c.layers)]


def last_of(name: str, default: int) -> Rule:
    """Every so many-th layer is full, those before it have a window."""
    return lambda c: ["full" if (i + 1) % c.size(name, default) == 0 else "window" for i in range(c.layers)]


def windows_if_used(c: Fields) -> list[str]:
    """A window in all layers, unless `use_sliding_window` says no (Qwen 3's mixtures of experts)."""
    return [("window" if c.flag("use_sliding_window") else "full")] * c.layers


def upper_windows(c: Fields) -> list[str]:
    """The layers from `max_window_layers` up have a window, if `use_sliding_window` (Qwen 2 and 3)."""
    first = c.count("max_window_layers") if c.flag("use_sliding_window") else c.layers
    return ["full" if i < first else "window" for i in range(c.layers)]


def lower_windows(c: Fields) -> list[str]:
    """Every second of the layers below `max_window_layers`, from the first, has one (Qwen 2's mixtures of experts)."""
    end = c.count("max_window_layers") if c.flag("use_sliding_window") else 0
    return ["full" if i % 2 or i >= end else "window" for i in range(c.layers)]


def with_rope(c: Fields) -> list[bool]:
    """1 for a layer with rotation in `no_rope_layers`, whose name says the opposite; else by their interval."""
    given = c("no_rope_layers")
    if given:
        return [bool(one) for one in c.listed("no_rope_layers", (0, 1))]
    every = c.size("no_rope_layer_interval")
    return [(i + 1) % every != 0 for i in range(c.layers)]


def smollm3_windows(c: Fields) -> list[str]:
    """Layers without rotation have a window, if any have."""
    used = c.flag("use_sliding_window")
    return ["window" if used and not rotary else "full" for rotary in with_rope(c)]


def blocks_of_kinds(c: Fields) -> list[str]:
    """GPT-Neo's [[["global", "local"], 12]]: pairs of kinds and how often they follow each other."""
    names = {"global": "full", "local": "window"}
    given = c("attention_types")
    if given is None:
        return cycle("full", "window")(c)
    try:
        kinds = [names[kind] for block, times in given for _ in range(min(times, c.layers)) for kind in block]
    except (TypeError, ValueError, KeyError):
        kinds = []
    if len(kinds) != c.layers:
        raise ConfigError(
            f"attention_types = {shown(given)}: must be pairs of kinds (global, local) and how often they repeat, "
            f"{c.layers} layers in all"
        )
    return kinds


def after_first(c: Fields) -> list[bool]:
    """All layers but the first `first_k_dense_replace` have experts."""
    return [i >= c.count("first_k_dense_replace") for i in range(c.layers)]


def every_step(c: Fields) -> list[bool]:
    """Every `decoder_sparse_step`-th layer has experts, but for `mlp_only_layers`."""
    step, dense = c.size("decoder_sparse_step"), c.indices("mlp_only_layers")
    return [i not in dense and (i + 1) % step == 0 for i in range(c.layers)]


def every_step_after_two(c: Fields) -> list[bool]:
    """The same, where no `mlp_only_layers` are the first two (Flint)."""
    dense = (0, 1) if c("mlp_only_layers") is None else ()
    return [every and i not in dense for i, every in enumerate(every_step(c))]


def at_moe_layers(c: Fields) -> list[bool]:
    """Those that `moe_layers` lists; else every `interleave_moe_layer_step`-th (Llama 4)."""
    if c("moe_layers") is not None:
        return [i in c.indices("moe_layers") for i in range(c.layers)]
    return [(i + 1) % c.size("interleave_moe_layer_step") == 0 for i in range(c.layers)]


def between_moe_layers(c: Fields) -> list[bool]:
    """Every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index`, -1 being the last."""
    every, first, last = c.size("moe_layer_interval"), c.count("moe_layer_start_index"), c("moe_layer_end_index")
    last = c.layers - 1 if last in (-1, None) else c.count("moe_layer_end_index")
    return [(i + 1) % every == 0 and first <= i <= last for i in range(c.layers)]


def falcon_order(c: Fields) -> str:
    """Two norms side by side in the new decoder, unless told otherwise."""
    if not c.flag("parallel_attn"):
        if c.flag("new_decoder_architecture"):
            raise ConfigError("parallel_attn = False: the new decoder architecture is parallel; allowed is true")
        return "pre"
    norms = c("num_ln_in_parallel_attn")
    return "parallel-two" if norms == 2 or (norms is None and c.flag("new_decoder_architecture")) else "parallel"


def falcon_heads(c: Fields) -> int | None:
    """One key/value head if `multi_query`, `num_kv_heads` in the new decoder."""
    if c.flag("new_decoder_architecture"):
        heads: int | None = c.size_or_none("num_kv_heads")
        return heads
    return 1 if c.flag("multi_query") else None


def latent_scale(c: Fields) -> float:
    """1 / sqrt(width of a query), times the square of yarn's factor for long contexts (Peng et al. 2023)."""
    scale = 1 / sqrt(c.size("qk_nope_head_dim") + c.size("qk_rope_head_dim"))
    yarn = c.rope()
    if yarn.get("mscale_all_dim") and "factor" in yarn:
        factor = finite("rope_scaling.factor", yarn["factor"], above=True)
        mscale = finite("rope_scaling.mscale_all_dim", yarn["mscale_all_dim"])
        scale *= (0.1 * mscale * log(max(factor, 1)) + 1) ** 2
    return scale


def shared_if_any(name: str) -> Rule:
    """So many shared experts side by side are one of so many times the width; None where there are none."""
    return lambda c: (0 if c(name) is None else c.count(name)) * c.size("moe_intermediate_size") or None


shared_width = shared_if_any("n_shared_experts")


def by_group_limit(c: Fields) -> bool:
    """DeepSeek-V2 chooses among all experts, or within the best groups."""
    method = c("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"topk_method = {shown(method)}: allowed are greedy, group_limited_greedy")
    return method == "group_limited_greedy"


def if_grouped(name: str) -> Rule:
    """A size that only the choice within groups has."""
    return lambda c: c.size(name) if by_group_limit(c) else None


def normalised_by_sum(c: Fields) -> bool:
    """DBRX divides the weights by their norm of any order; order 1 is their sum, null is not at all."""
    order = c.inside("ffn_config")("moe_normalize_expert_weights")
    if order not in (1, None):
        raise ConfigError(f"moe_normalize_expert_weights = {shown(order)}: allowed are 1 (their sum) and null")
    return order is not None


def one_for_all(name: str) -> Rule:
    """A number, or a list with one for each layer, which must all be the same."""

    def rule(c: Fields) -> int:
        given = c(name)
        if isinstance(given, list) and len(given) == c.layers and all(one == given[0] for one in given):
            given = given[0]
        return c.as_size(name, given)

    return rule


def in_one_operator(c: Fields) -> str:
    """GPT-2's own spelling of the tanh approximation is eight operators; the bundled model has it in one."""
    name: str = c.activation("activation_function")
    return "gelu_tanh" if name == "gelu_new" else name


def gemma_activation(c: Fields) -> str:
    """Old files of Gemma say "gelu" and mean its tanh approximation."""
    return "gelu_tanh" if c("hidden_act") == "gelu" else c.activation("hidden_act")


def openai_activation(c: Fields) -> str:
    """The first GPT's "gelu" is the tanh approximation."""
    return "gelu_new" if c("afn") == "gelu" else c.activation("afn")


def query_scaling(c: Fields) -> str:
    """Llama 4 scales queries by their position where they are not rotated."""
    return "unrotated" if c.flag("attn_temperature_tuning") else "none"


def root_of_d(c: Fields) -> float:
    """What an embedding is multiplied with, so that it is as long as it is wide."""
    return sqrt(c.size("hidden_size"))


def four_d(c: Fields) -> int:
    """Vaswani et al. 2017: the feed-forward is four times as wide as the stream."""
    return 4 * c.size("hidden_size")


def or_four_d(name: str) -> Rule:
    """A size; null means 4 d."""
    return lambda c: c.size_or_none(name) or four_d(c)


def exaone_windows(c: Fields) -> list[str]:
    """Every `sliding_window_pattern`-th layer is full, the others have a window; "LLLG" says the same as 4."""
    given = c("sliding_window_pattern")
    every = len(given) if isinstance(given, str) and given else c.size("sliding_window_pattern", c.layers + 1)
    return ["full" if (i + 1) % every == 0 else "window" for i in range(c.layers)]


def dots_windows(c: Fields) -> list[str]:
    """The layers from `max_window_layers` up have a window."""
    return ["full" if i < c.count("max_window_layers") else "window" for i in range(c.layers)]


def in_windows_only(c: Fields) -> list[bool]:
    """Positions are rotary in layers with a window."""
    return [kind == "window" for kind in c.kinds]


def in_windows(c: Fields) -> list[bool]:
    """Positions are rotary in layers with a window only; in all where the file has no window."""
    return [kind == "window" or c("sliding_window") is None for kind in c.kinds]


def dense_prefix(c: Fields) -> list[bool]:
    """All layers but the first `first_k_dense_replace`, of a file that has it; or those of `mlp_layer_types`."""
    listed: list[bool] = listed_or(lambda c: [i >= _dense_prefix(c) for i in range(c.layers)])(c)
    return listed


def _dense_prefix(c: Fields) -> int:
    return c.count("first_k_dense_replace") if "first_k_dense_replace" in c.raw else 0


def windows_after_dense(c: Fields) -> list[str]:
    """Windows but in every so many-th layer, dense layers and others counted apart (Cohere 2 with experts)."""
    first = min(_dense_prefix(c), c.layers)
    every = [c.size("prefix_dense_sliding_window_pattern")] * first + [c.size("sliding_window_pattern")] * c.layers
    counted = [*range(1, first + 1), *range(1, c.layers - first + 1)]
    return ["window" if i % n else "full" for i, n in zip(counted, every, strict=False)]


def in_windows_or_dense(c: Fields) -> list[bool]:
    """Positions are rotary in layers with a window, and in dense ones whose own pattern is 1."""
    forced = c.size("prefix_dense_sliding_window_pattern") == 1
    return [kind == "window" or (forced and not sparse) for kind, sparse in zip(c.kinds, dense_prefix(c), strict=True)]


def with_rope_of_its_kind(c: Fields) -> list[bool]:
    """Layers of a kind that `rope_parameters` has null for are not rotated."""
    given = c.raw.get("rope_parameters")
    given = given if isinstance(given, dict) else {}
    names = {"full": "full_attention", "window": "sliding_attention"}
    return [given.get(names[kind], True) is not None for kind in c.kinds]


def said_to_be_attention(c: Fields) -> list[str]:
    """Granite 4's layers are attention where `layer_types` says so; a file without it means mamba in all of them."""
    if c("layers_block_type") is None:
        raise ConfigError(
            "layer_types: a file of the family without it means mamba layers throughout; read are those whose layers "
            "are all attention"
        )
    return ["full" for _ in c.listed("layers_block_type", ("attention", "full_attention"))]


def chosen_score(c: Fields) -> str:
    """How the chosen experts' logits become weights, by `expert_selection_fn`."""
    name = c("expert_selection_fn")
    if name not in ("softmax", "sigmoid"):
        raise ConfigError(f"expert_selection_fn = {shown(name)}: allowed are softmax, sigmoid")
    return "logits" if name == "softmax" else "sigmoid-chosen"


def averaged_with_shared(c: Fields) -> bool:
    """Whether the shared expert's result is averaged with the others', or added."""
    how = c("shared_expert_combination_strategy")
    if how not in ("average", "sum"):
        raise ConfigError(f"shared_expert_combination_strategy = {shown(how)}: allowed are average, sum")
    return how == "average" and c.count("num_shared_experts") > 0


def with_theta(c: Fields) -> list[bool]:
    """Layers whose base of rotary positions is 0 or null have none (Granite 4)."""
    given = c.raw.get("layer_rope_theta")
    if given is None:
        return [True] * c.layers
    if not isinstance(given, list) or len(given) != c.layers:
        raise ConfigError(f"layer_rope_theta: must be a list with one entry for each of the {c.layers} layers")
    return [bool(theta) for theta in given]


def listed_or(rule: Rule) -> Rule:
    """The layers that `mlp_layer_types` calls sparse have experts; without such a list those of another rule."""

    def layers(c: Fields) -> list[bool]:
        if c.raw.get("mlp_layer_types") is None:
            found: list[bool] = rule(c)
            return found
        return [kind == "sparse" for kind in c.listed("mlp_layer_types", ("dense", "sparse"))]

    return layers


listed_or_after_first = listed_or(after_first)
listed_or_after_one = listed_or(lambda c: [i > 0 for i in range(c.layers)])
listed_or_all = listed_or(lambda c: [True] * c.layers)


def shared_of(name: str) -> Rule:
    """So many experts that all tokens go through are one of so many times the width of an expert."""
    return lambda c: c.size(name) * c.size("moe_intermediate_size")


def residual_of_depth(c: Fields) -> float:
    """MiniCPM's scale_depth / sqrt(L); null is sqrt(L) / sqrt(L)."""
    return 1.0 if c("scale_depth") is None else c.number("scale_depth") / sqrt(c.layers)


def logits_of_base(c: Fields) -> float:
    """MiniCPM divides what goes into the head by d_model / dim_model_base."""
    d = c.size("hidden_size")
    return c.size("dim_model_base", d) / d
