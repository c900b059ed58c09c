"""The catalogue of accelerators: names, units, what is verified, and clusters."""

import math
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.describe.catalogue import read_data
from estimator.describe.checks import ConfigError
from estimator.hardware.accelerators import DTYPES, PROFILE_LIMIT, Accelerator, accelerator, accelerators, cluster

IDS = accelerators()
GIB = 2**30


# What torch.cuda reports, read in out-of-memory messages of public runs, in GiB; the rest is from the datasheets.
@pytest.mark.parametrize(
    ("id_", "gib", "bandwidth", "peaks"),
    [
        ("a100-40gb-sxm", 39.49, 1555e9, {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "fp64": 9.7e12}),
        ("a100-80gb-sxm", 79.25, 2039e9, {"fp32": 19.5e12, "fp16": 312e12}),
        ("a100-40gb-pcie", 39.39, 1555e9, {"bf16": 312e12}),
        ("a100-80gb-pcie", 79.15, 1935e9, {"bf16": 312e12}),
        ("h100-80gb-sxm", 79.18, 3350e9, {"bf16": 989.4e12, "fp8": 1978.9e12}),
        ("h100-80gb-pcie", 79.1, 2000e9, {"bf16": 756e12}),
        ("h200-141gb-sxm", 139.8, 4800e9, {"bf16": 989.4e12}),
        ("b200-180gb-sxm", 178.35, 8000e9, {"bf16": 2250e12}),
        ("v100-32gb-sxm", 31.73, 900e9, {"fp16": 125e12, "fp32": 15.7e12}),
        ("t4-16gb", 14.56, 320e9, {"fp16": 65e12, "fp32": 8.1e12}),
        ("l4-24gb", 22.03, 300e9, {"bf16": 121e12}),
        ("rtx-4090-24gb", 23.52, 1008e9, {"bf16": 165.2e12}),
    ],
)
def test_known_figures_in_base_units(id_, gib, bandwidth, peaks):
    a = accelerator(id_)
    assert a.memory_bytes == math.floor(gib * GIB)
    assert a.memory_bandwidth == bandwidth
    assert {dtype: a.peak_flops(dtype) for dtype in peaks} == peaks


def test_the_catalogue_is_wide():
    assert len(IDS) >= 45
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("id_", IDS)
def test_every_entry_is_sound(id_):
    a = accelerator(id_)
    assert a.id == id_
    assert a.sources
    assert all(a.sources)
    assert hash(a) == hash(pickle.loads(pickle.dumps(a)))  # noqa: S301 - our own bytes, made in this line
    # A framework sees less than the driver, and the units are right: bytes are gigabytes, rates are of 2017 and later.
    if a.memory_driver_bytes is not None:
        assert a.memory_bytes <= a.memory_driver_bytes
    assert a.memory_marketed_bytes is not None
    assert 0.7 < a.memory_bytes / a.memory_marketed_bytes < 1.08  # GiB taken for GB would be 1.074
    assert 1e10 < a.memory_bytes < 1e12
    assert 1e11 < a.memory_bandwidth < 1e13
    assert all(1e11 < flops < 1e17 for flops in a.peak.values())
    assert a.power is None or 20 < a.power < 2000
    assert a.boost_clock is None or 1e9 < a.boost_clock < 3e9
    for dtype, measured in a.measured_peaks:
        assert measured <= a.peak_flops(dtype)
    for link in (a.scale_up_bandwidth, a.pcie_bandwidth, a.inter_node_bandwidth):
        assert link is None or 1e9 < link < a.memory_bandwidth
    assert (a.scale_up_bandwidth is None) == (a.scale_up_size is None)
    assert (a.scale_up_size or 1) <= a.per_node
    # Peaks do not fall as the format narrows; int8 has its own units, and Gaudi 3 computes fp8 at bf16's rate.
    ladder = [a.peak[dtype] for dtype in ("fp32", "tf32", "bf16", "fp8", "fp4") if dtype in a.peak]
    assert ladder == sorted(ladder)


def test_memory_that_nobody_printed_is_marked_and_errs_low():
    derived = [a for a in map(accelerator, IDS) if a.memory_driver_bytes is None]
    assert derived
    for a in derived:
        assert not a.is_verified("memory_bytes")
        assert a.memory_bytes <= a.memory_marketed_bytes


def test_recalled_entries_have_nothing_verified():
    for a in map(accelerator, IDS):
        if a.sources == ("recalled, not read in a source",):
            fields = ["memory_bytes", "memory_bandwidth", *(f"peak.{dtype}" for dtype in a.peak)]
            assert not any(a.is_verified(field) for field in fields)


@given(st.sampled_from(IDS), st.sampled_from(["-", "_", " ", ""]), st.booleans())
def test_an_id_is_found_in_any_spelling(id_, joint, upper):
    spelled = id_.replace("-", joint)
    assert accelerator(spelled.upper() if upper else spelled).id == id_


@pytest.mark.parametrize("id_", IDS)
def test_its_own_names_mean_it(id_):
    entry = read_data("accelerators")["accelerator"][id_]
    for name in (entry["name"], f"NVIDIA {id_}", *entry.get("aliases", ())):
        assert accelerator(name).id == id_


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        # as nvidia-smi and rocm-smi print them
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-sxm"),
        ("NVIDIA H100 PCIe", "h100-80gb-pcie"),
        ("NVIDIA H100 NVL", "h100-94gb-nvl"),
        ("NVIDIA H200", "h200-141gb-sxm"),
        ("NVIDIA H200 NVL", "h200-141gb-nvl"),
        ("NVIDIA B200", "b200-180gb-sxm"),
        ("NVIDIA GB200", "gb200-186gb"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb-sxm"),
        ("Tesla V100-PCIE-16GB", "v100-16gb-pcie"),
        ("Tesla T4", "t4-16gb"),
        ("NVIDIA L4", "l4-24gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA A10G", "a10g-24gb"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090-24gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090-24gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada-48gb"),
        ("AMD Instinct MI300X OAM", "mi300x-192gb"),
        # as people write them
        ("A100-SXM4-80GB", "a100-80gb-sxm"),
        ("A100 SXM 80 GB", "a100-80gb-sxm"),
        ("a100 80GiB pcie", "a100-80gb-pcie"),
        ("h100 sxm", "h100-80gb-sxm"),
        ("H100 SXM5", "h100-80gb-sxm"),
        ("RTX 4090", "rtx-4090-24gb"),
        ("4090", "rtx-4090-24gb"),
        ("3090 ti", "rtx-3090-ti-24gb"),
        ("A6000", "rtx-a6000-48gb"),
        ("Gaudi 2", "gaudi2-96gb"),
        ("TPU v5p", "tpu-v5p-95gb"),
        ("v5e", "tpu-v5e-16gb"),
        ("M2 Ultra", "apple-m2-ultra-192gb"),
    ],
)
def test_names_as_drivers_and_people_write_them(name, id_):
    assert accelerator(name).id == id_


@pytest.mark.parametrize(
    ("bare", "variants"),
    [
        ("H100", ["h100-80gb-pcie", "h100-80gb-sxm", "h100-96gb-sxm", "h100-94gb-nvl"]),
        ("A100", ["a100-40gb-sxm", "a100-80gb-sxm", "a100-40gb-pcie", "a100-80gb-pcie"]),
        ("A100 80GB", ["a100-80gb-sxm", "a100-80gb-pcie"]),
        ("nvidia v100", ["v100-16gb-sxm", "v100-32gb-sxm", "v100-16gb-pcie"]),
        ("H200", ["h200-141gb-sxm", "h200-141gb-nvl"]),
        ("RTX 6000", ["rtx-6000-ada-48gb", "rtx-pro-6000-96gb"]),
    ],
)
def test_a_name_that_means_several_is_refused_with_all_of_them(bare, variants):
    with pytest.raises(ConfigError) as caught:
        accelerator(bare)
    assert str(caught.value) == f"accelerator = {bare!r}: could be any of {', '.join(variants)}; name one"


@pytest.mark.parametrize(
    ("wrong", "near"), [("h1000", "h100"), ("a100-80gb-smx", "a100-80gb-sxm"), ("mi300", "mi300x")]
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong, near):
    with pytest.raises(
        ConfigError, match=rf"accelerator = '{wrong}': did you mean .*{near}.*allowed are v100-16gb-sxm"
    ):
        accelerator(wrong)


@pytest.mark.parametrize("nothing", ["", "  ", "gpu", "nvidia", "-", None, 7])
def test_a_name_that_says_nothing_is_refused(nothing):
    with pytest.raises(ConfigError, match=r"^accelerator = "):
        accelerator(nothing)


def test_an_accelerator_is_its_own_name():
    a = accelerator("t4")
    assert accelerator(a) is a


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "torch.bfloat16"])
def test_dtypes_have_several_spellings(dtype):
    assert accelerator("a100-80gb-sxm").peak_flops(dtype) == 312e12


@given(st.sampled_from(IDS), st.sampled_from(DTYPES))
def test_a_peak_that_nobody_publishes_is_refused_with_those_that_are(id_, dtype):
    a = accelerator(id_)
    if dtype in a.peak:
        assert a.peak_flops(dtype) == a.peak[dtype] > 0
    else:
        with pytest.raises(
            ConfigError, match=re.escape(f"dtype = {dtype!r}: {id_} has a peak for {', '.join(a.peak)}")
        ):
            a.peak_flops(dtype)


def test_what_is_verified():
    a = accelerator("a10g")
    assert a.is_verified("memory_bytes")
    assert not a.is_verified("peak.bf16")
    assert a.is_verified("peak.int8")
    assert not a.is_verified("peaks")
    assert not a.is_verified("peak.fp8")  # there is no figure to verify
    assert not a.is_verified("inter_node_bandwidth")
    assert not accelerator("mi350x").is_verified("peak.bf16")  # all of its peaks are scaled from another's
    assert accelerator("h100 sxm").is_verified("peaks")
    with pytest.raises(ConfigError, match="field = 'memory'"):
        a.is_verified("memory")


PROFILE = """
memory_bytes = 16_000_000_000
memory_bandwidth = 40e9
peak = { fp32 = 1.2e12 }
device = "cpu"
sources = ["measured on 2026-11-23"]
"""


def test_a_profile_is_an_accelerator_like_any_other(tmp_path):
    path = tmp_path / "my-machine.toml"
    path.write_text(PROFILE + "[calibration]\nmatmul = [[1e6, 0.5]]\n")
    for name in (path, str(path)):
        a = accelerator(name)
        assert (a.id, a.device, a.memory_bytes, a.memory_bandwidth) == ("my-machine", "cpu", 16 * 10**9, 40e9)
        assert a.peak_flops("float32") == 1.2e12
        assert a.profile == str(path)
        assert cluster(a).count == 1


@given(st.sampled_from(IDS))
def test_to_dict_is_a_profile(id_):
    from estimator.hardware.accelerators import _build

    a = accelerator(id_)
    assert _build(a.to_dict()) == a


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"memory_bytes = ", "is not TOML"),
        (b"\xff\xfe", "must be TOML in UTF-8"),
        (b"# " + b"x" * PROFILE_LIMIT, "larger than 1,000,000 bytes"),
        (b"memory_bandwidth = 1.0", "memory_bytes is missing"),
        (PROFILE.encode() + b"memory_bandwith = 3", "field = 'memory_bandwith': did you mean memory_bandwidth"),
        (PROFILE.replace("16_000_000_000", "16e9").encode(), "memory_bytes = 16000000000.0: must be an integer"),
        (
            PROFILE.replace("40e9", "-1.0").encode(),
            "memory_bandwidth = -1.0: must be a finite number of at least 0.001",
        ),
        (PROFILE.replace("40e9", "nan").encode(), "memory_bandwidth = nan"),
        (PROFILE.replace("fp32", "fp33").encode(), "dtype of a peak = 'fp33': did you mean"),
        (PROFILE.replace("{ fp32 = 1.2e12 }", "3").encode(), "peak = 3: must be a table"),
        (PROFILE.replace("{ fp32 = 1.2e12 }", "{}").encode(), "must have the peak of at least one dtype"),
        (PROFILE.replace('"cpu"', '"gpu"').encode(), "device = 'gpu': did you mean"),
        (PROFILE.encode() + b"vendor = 3", "vendor = 3: must be a string"),
        (PROFILE.encode() + b"aliases = 3", "aliases = 3: must be a list of strings"),
        (PROFILE.encode() + b'unverified = ["memory"]', "field = 'memory'"),
    ],
)
def test_a_broken_profile_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "machine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"profile {str(path)!r}: ") + ".*" + re.escape(message)):
        accelerator(path)


def test_a_profile_that_is_not_there_is_one_clear_error():
    with pytest.raises(ConfigError, match=r"profile 'none\.toml': cannot be read"):
        accelerator("./none.toml")


@given(st.sampled_from(IDS), st.integers(1, 4096), st.integers(1, 64))
def test_a_cluster_fills_its_nodes_or_is_refused(id_, count, per_node):
    size = min(count, per_node)
    if count % size:
        with pytest.raises(ConfigError, match=f"count = {count}: must fill whole nodes of {size}"):
            cluster(id_, count, per_node, within=1e9, between=1e9)
    else:
        c = cluster(id_, count, per_node, within=1e9, between=1e9)
        assert c.count == c.nodes * c.per_node == count
        assert c.nodes == math.ceil(count / per_node)
        assert (c.within is None) == (c.per_node == 1)
        assert (c.between is None) == (c.nodes == 1)


def test_links_of_a_cluster():
    c = cluster("h100 sxm", 16)
    assert (c.nodes, c.per_node, c.within, c.between) == (2, 8, 450e9, 50e9)
    assert cluster("h100 sxm", 4).within == 450e9
    # A bridge joins a pair; four cards speak over PCIe.
    assert cluster("h100 pcie", 2).within == 300e9
    assert cluster("h100 pcie", 4).within == 63e9
    assert cluster("RTX 4090", 2).within == 31e9
    assert cluster("gb200", 144).nodes == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "RTX 4090", "count": 16}, "between = None: no figure is known for rtx-4090-24gb"),
        ({"name": "h100 sxm", "count": 12}, "count = 12: must fill whole nodes of 8"),
        ({"name": "h100 sxm", "count": 0}, "count = 0"),
        ({"name": "h100 sxm", "count": 8, "per_node": 2.5}, "per_node = 2.5"),
        ({"name": "h100 sxm", "count": 8, "within": 0}, "within = 0: must be a finite number of at least 0.001"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        cluster(**arguments)


def test_the_data_file_cites_only_sources_that_it_explains():
    data = read_data("accelerators")
    cited = {key for entry in data["accelerator"].values() for key in entry["sources"]}
    assert cited == set(data["source"])


def test_an_accelerator_can_be_made_by_hand_and_not_changed():
    a = Accelerator("x", "x", 10**10, 1e11, (("fp32", 1e12),))
    assert a.device == "cuda"
    with pytest.raises(AttributeError):
        a.power = 3
