"""How transformers' classes write their mixtures of experts down; see `estimator.describe.transformers`."""

from __future__ import annotations

from dataclasses import dataclass

EXPERTS_FIRST = ("experts", "router")


@dataclass(frozen=True, slots=True)
class Routed:
    """What sets one class's mixture of experts apart from another's, beyond its parts.

    Attributes:
        router: how it chooses, one of `estimator.models.hugging_face.routers.ROUTERS`.
        logits: in which dtype: "" (the inputs'), "fp32" (the inputs are cast), "fp32-alone" (and autocast is off),
            "late" (they are cast themselves).
        weights: the dtype that they are cast to: "" (none), "logits" or "inputs" (theirs).
        order: what is registered first; what is not named comes after.
        shared: when the shared expert runs: "first", "between" (after the router), "last", "named" (likewise, with a
            name for its result; whole, it gets the rows made whole), "beside" (in the layer, after the block).
        whole: which of "router" and "shared" get what the block gets, in place of rows of tokens.
        adds_fp32: the shared expert's result is added in fp32 (HY V3).
        returns_weights: with what comes out, and the layer has a name for them (gpt-oss).
        transposed: the experts' matrices are (in, out), as they are multiplied with.
    """

    router: str = "softmax"
    logits: str = ""
    weights: str = ""
    order: tuple[str, ...] = ("router", "experts")
    shared: str = "last"
    whole: tuple[str, ...] = ()
    adds_fp32: bool = False
    returns_weights: bool = False
    transposed: bool = False


MIXTRAL = Routed()
QWEN = Routed(weights="logits", order=EXPERTS_FIRST)
DEEPSEEK = Routed(router="groups", logits="fp32", order=EXPERTS_FIRST, whole=("router", "shared"))
GRANITE = Routed(router="chosen", logits="late", weights="inputs", shared="beside")
HUNYUAN = Routed("hunyuan_v1_moe", weights="logits", shared="first", whole=("shared",))
