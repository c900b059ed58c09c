"""How transformers' classes write their mixtures of experts down; see `estimator.describe.transformers`."""

from __future__ import annotations

from dataclasses import dataclass

EXPERTS_FIRST = ("experts", "router")


@dataclass(frozen=True, slots=True)
class Routed:
    """What sets one class's mixture of experts apart from another's, beyond its parts.

    Attributes:
        router: how it chooses, one of `estimator.models.hugging_face.routers.ROUTERS`.
        like_logits: the weights are cast to the logits' dtype.
        order: what is registered first; what is not named comes after.
        shared: when the shared expert runs: "first", "between" (after the router), "last".
        whole: which of "router" and "shared" get what the block gets, in place of rows of tokens.
    """

    router: str = "softmax"
    like_logits: bool = False
    order: tuple[str, ...] = ("router", "experts")
    shared: str = "last"
    whole: tuple[str, ...] = ()


MIXTRAL = Routed()
QWEN = Routed(like_logits=True, order=EXPERTS_FIRST)
DEEPSEEK = Routed(router="sigmoid", order=EXPERTS_FIRST, whole=("router", "shared"))
