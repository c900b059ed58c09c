"""Accelerators, and the clusters made of them: data with sources, in base units (bytes, FLOP/s, bytes/s, Hz, W)."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from estimator.describe.catalogue import number, read_data, squash, unknown
from estimator.describe.checks import PATH_SHOWN, ConfigError, choose, positive_int, shown
from estimator.describe.run import Run
from estimator.describe.settings import checked

DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4")
DTYPE_SPELLINGS = {
    "float64": "fp64",
    "double": "fp64",
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float8": "fp8",
    "float4": "fp4",
}
DEVICES = ("cuda", "cpu", "hpu", "mps", "xla")
RATES = (1e-3, 1e30)  # (least, most) of what a second, a watt or a hertz is counted by: times stay finite
PROFILE_LIMIT = 1_000_000  # bytes; a profile is a few hundred lines, so anything larger is another file
# Words that people and drivers put around a name and that tell nothing apart.
NOISE = {
    "nvidia",
    "tesla",
    "geforce",
    "amd",
    "instinct",
    "google",
    "cloud",
    "intel",
    "habana",
    "aws",
    "gpu",
    "generation",
}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator as a framework sees it: one device of `torch.cuda.device_count()`, one TPU chip.

    Bandwidths are in bytes/s and in one direction; peaks in FLOP/s, dense, without sparsity. None means that no figure
    is published.

    Attributes:
        id: the catalogue's name, such as "a100-80gb-sxm"; for a profile the file's stem.
        name: as the vendor or the driver writes it.
        memory_bytes: what a framework can use, less than the driver reports.
        memory_bandwidth: peak of the device's own memory.
        peaks: pairs of dtype and peak, see `peak` and `peak_flops`.
        device: the framework's name of the kind of device; AMD's is "cuda" too, as in PyTorch.
        memory_driver_bytes: what nvidia-smi and the like print.
        memory_marketed_bytes: the label, its GB taken as 10^9.
        measured_peaks: pairs of dtype and the best matrix product that anybody measured ("MAMF").
        sm_count: streaming multiprocessors, compute units or cores.
        boost_clock: Hz.
        power: W, the board's limit.
        l2_bytes: last-level cache on the device.
        scale_up_link: NVLink, xGMI, ICI, ...; "none" without one.
        scale_up_bandwidth: of that link, for one accelerator.
        scale_up_size: accelerators that it joins.
        pcie_bandwidth: to the host.
        inter_node_bandwidth: typical network, for one accelerator.
        per_node: accelerators in one node.
        unverified: names of fields that were recalled or derived, not read in a source; "peak.bf16" is one peak and
            "peaks" all of them.
        profile: the file that this was read from, for one that is not in the catalogue.

    Raises:
        ConfigError: a size or a rate is not positive, a dtype is unknown.
    """

    id: str
    name: str
    memory_bytes: int
    memory_bandwidth: float
    peaks: tuple[tuple[str, float], ...]
    vendor: str = ""
    architecture: str = ""
    form_factor: str = ""
    device: str = "cuda"
    memory_driver_bytes: int | None = None
    memory_marketed_bytes: int | None = None
    measured_peaks: tuple[tuple[str, float], ...] = ()
    sm_count: int | None = None
    boost_clock: float | None = None
    power: float | None = None
    l2_bytes: int | None = None
    scale_up_link: str = "none"
    scale_up_bandwidth: float | None = None
    scale_up_size: int | None = None
    pcie_bandwidth: float | None = None
    inter_node_bandwidth: float | None = None
    per_node: int = 1
    aliases: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    notes: str = ""
    profile: str | None = None

    def __post_init__(self) -> None:
        choose("device", self.device, DEVICES)
        for name in ("memory_bytes", "per_node"):
            positive_int(name, getattr(self, name))
        for name in ("memory_driver_bytes", "memory_marketed_bytes", "sm_count", "l2_bytes", "scale_up_size"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name))
        number("memory_bandwidth", self.memory_bandwidth, *RATES)
        for name in ("boost_clock", "power", "scale_up_bandwidth", "pcie_bandwidth", "inter_node_bandwidth"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), *RATES)
        if not self.peaks:
            raise ConfigError("peaks = (): must have the peak of at least one dtype, in FLOP/s")
        for dtype, flops in (*self.peaks, *self.measured_peaks):
            choose("dtype of a peak", dtype, DTYPES)
            number(f"peak.{dtype}", flops, *RATES)
        for field in self.unverified:
            self._known(field)

    @property
    def peak(self) -> dict[str, float]:
        """Dense peak in FLOP/s by dtype."""
        return dict(self.peaks)

    def peak_flops(self, dtype: str) -> float:
        """Dense peak of `dtype` in FLOP/s; "float32" and "torch.bfloat16" are understood.

        Raises:
            ConfigError: no figure is published for that dtype; the message names those that have one.
        """
        short = str(dtype).removeprefix("torch.")
        short = DTYPE_SPELLINGS.get(short, short)
        if short not in self.peak:
            raise ConfigError(f"dtype = {shown(str(dtype))}: {self.id} has a peak for {', '.join(self.peak)}")
        return self.peak[short]

    def is_verified(self, field: str) -> bool:
        """Whether the figure in `field` was read in a source; False too where there is no figure.

        Raises:
            ConfigError: no such field ("peak.bf16" is one peak).
        """
        self._known(field)
        if field == "peaks":
            return not any(name == "peaks" or name.startswith("peak.") for name in self.unverified)
        if field.startswith("peak."):
            present = field.removeprefix("peak.") in self.peak
            return present and field not in self.unverified and "peaks" not in self.unverified
        return getattr(self, field) is not None and field not in self.unverified

    def to_dict(self) -> dict[str, Any]:
        """The fields as a profile file has them; what is absent is left out."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["peak"], plain["measured_peak"] = dict(plain.pop("peaks")), dict(plain.pop("measured_peaks"))
        return {
            name: list(v) if isinstance(v, tuple) else v for name, v in plain.items() if v not in (None, (), {}, "")
        }

    def _known(self, field: str) -> None:
        names = [f.name for f in fields(self)]
        choose("field", field, (*names, *(f"peak.{dtype}" for dtype in DTYPES)))


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` equal nodes of `per_node` accelerators each.

    Attributes:
        accelerator: what it is made of.
        nodes: number of nodes.
        per_node: accelerators in each.
        within: bytes/s that one accelerator sends inside its node; None in a node of one.
        between: bytes/s that one accelerator sends to another node; None with one node.
    """

    accelerator: Accelerator
    nodes: int = 1
    per_node: int = 1
    within: float | None = None
    between: float | None = None

    @property
    def count(self) -> int:
        """Accelerators in all."""
        return self.nodes * self.per_node


def accelerators() -> tuple[str, ...]:
    """The catalogue's ids, grouped by vendor and generation."""
    return tuple(read_data("accelerators")["accelerator"])


def accelerator(name: str | Path | Accelerator) -> Accelerator:
    """The accelerator that `name` means.

    Args:
        name: an id ("a100-80gb-sxm"), the name on the box or in the driver ("NVIDIA A100-SXM4-80GB", "RTX 4090"),
            enough words to tell it from all others ("h100 pcie"), or the path of a profile (a .toml file with the
            fields of a catalogue entry; see `Accelerator`). An Accelerator is returned as it is.

    Raises:
        ConfigError: unknown (the nearest ids come first), ambiguous (the variants are listed: a bare "H100" may be
            three different speeds), or a profile that cannot be read.
    """
    if isinstance(name, Accelerator):
        return name
    if isinstance(name, Path) or (isinstance(name, str) and name.endswith(".toml")):
        return _profile(Path(name))
    if not isinstance(name, str):
        raise ConfigError(f"accelerator = {shown(name)}: must be a name, or the path of a profile")
    exact = _spellings()
    for spelling in (name, " ".join(_words(name))):
        if squash(spelling) in exact:
            return _entry(exact[squash(spelling)])
    wanted = set(_words(name))
    meant = [id_ for id_, words in _vocabulary().items() if wanted and wanted <= words]
    if len(meant) == 1:
        return _entry(meant[0])
    if meant:
        raise ConfigError(f"accelerator = {shown(name)}: could be any of {', '.join(meant)}; name one")
    raise unknown("accelerator", name, exact, accelerators())


def cluster(
    name: str | Path | Accelerator,
    count: int = 1,
    per_node: int | None = None,
    within: float | None = None,
    between: float | None = None,
) -> Cluster:
    """`count` accelerators in nodes of `per_node`, by default the catalogue's.

    Args:
        name: as for `accelerator`.
        count: accelerators in all. Fewer than fill one node are one smaller node.
        per_node: accelerators in one node.
        within: bytes/s of one accelerator inside its node; by default its scale-up link's where that joins the whole
            node, else PCIe's.
        between: bytes/s of one accelerator to other nodes; by default the catalogue's typical network.

    Raises:
        ConfigError: `count` does not fill whole nodes, or a link that is needed has no figure.
    """
    a = accelerator(name)
    count = checked(Run, "count", count)
    per_node = min(count, positive_int("per_node", a.per_node if per_node is None else per_node))
    if count % per_node:
        raise ConfigError(f"count = {count}: must fill whole nodes of {per_node} (per_node) {a.id}")
    nodes = count // per_node
    if within is None:
        within = a.scale_up_bandwidth if per_node <= (a.scale_up_size or 1) else a.pcie_bandwidth
    if between is None:
        between = a.inter_node_bandwidth
    for field, link, needed in (("within", within, per_node > 1), ("between", between, nodes > 1)):
        if needed and link is None:
            raise ConfigError(f"{field} = None: no figure is known for {a.id}; give the bytes/s of one accelerator")
        if link is not None:
            number(field, link, *RATES)
    return Cluster(a, nodes, per_node, within if per_node > 1 else None, between if nodes > 1 else None)


def _words(name: str) -> list[str]:
    """Lower-case words of a name, "80 GB" and "80GiB" joined to "80gb", without the noise."""
    text = re.sub(r"(\d)\s*gi?b\b", r"\1gb", name.lower())
    return [word for word in re.split(r"[^a-z0-9]+", text) if word and word not in NOISE]


@cache
def _spellings() -> dict[str, str]:
    """Squashed id, name or alias -> id."""
    return {
        squash(spelling): id_
        for id_, entry in read_data("accelerators")["accelerator"].items()
        for spelling in (id_, entry["name"], *entry.get("aliases", ()))
    }


@cache
def _vocabulary() -> dict[str, set[str]]:
    """Id -> the words by which it may be called."""
    return {
        id_: set(_words(" ".join((id_, entry["name"], entry["architecture"], entry["form_factor"]))))
        for id_, entry in read_data("accelerators")["accelerator"].items()
    }


@cache
def _entry(id_: str) -> Accelerator:
    data = read_data("accelerators")
    entry = dict(data["accelerator"][id_])
    entry["sources"] = [data["source"][key] for key in entry["sources"]]
    return _build({**entry, "id": id_})


def _build(table: dict[str, Any]) -> Accelerator:
    """The Accelerator of one table of a data file, where a peak is a table of its own."""
    plain = dict(table)
    for ours, theirs in (("peaks", "peak"), ("measured_peaks", "measured_peak")):
        peaks = plain.pop(theirs, {})
        if not isinstance(peaks, dict):
            raise ConfigError(f"{theirs} = {shown(peaks)}: must be a table of dtype = FLOP/s")
        plain[ours] = tuple(peaks.items())
    for name in ("aliases", "sources", "unverified"):
        values = plain.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{name} = {shown(values)}: must be a list of strings")
        plain[name] = tuple(values)
    for name in ("name", "vendor", "architecture", "form_factor", "scale_up_link", "notes"):
        if not isinstance(plain.get(name, ""), str):
            raise ConfigError(f"{name} = {shown(plain[name])}: must be a string")
    return Accelerator(**plain)


def _profile(path: Path) -> Accelerator:
    """Read a machine's own profile. Its `calibration` table, if any, belongs to the timing model and is left alone."""
    try:
        with path.open("rb") as file:
            content = file.read(PROFILE_LIMIT + 1)
        if len(content) > PROFILE_LIMIT:
            raise ConfigError(
                f"profile {shown(str(path), PATH_SHOWN)}: larger than {PROFILE_LIMIT:,} bytes, so it is no profile"
            )
        table = tomllib.loads(content.decode())
    except OSError as error:
        raise ConfigError(f"profile {shown(str(path), PATH_SHOWN)}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"profile {shown(str(path), PATH_SHOWN)}: must be TOML in UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"profile {shown(str(path), PATH_SHOWN)}: is not TOML ({error})") from None
    table.pop("calibration", None)
    missing = [field for field in ("memory_bytes", "memory_bandwidth", "peak") if field not in table]
    if missing:
        raise ConfigError(
            f"profile {shown(str(path), PATH_SHOWN)}: {missing[0]} is missing; needed are memory_bytes, "
            "memory_bandwidth, peak"
        )
    allowed = {f.name for f in fields(Accelerator)} - {"peaks", "measured_peaks", "profile"} | {"peak", "measured_peak"}
    try:
        for field in table:
            choose("field", field, sorted(allowed))
        return _build({"id": path.stem, "name": path.stem, **table, "profile": str(path)})
    except ConfigError as error:
        raise ConfigError(f"profile {shown(str(path), PATH_SHOWN)}: {error}") from None
