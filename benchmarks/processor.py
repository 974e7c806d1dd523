"""Which processor a figure belongs to: its name, the vector instructions that decide speed, and the switches that hold them back.

The name alone does not tell: "Intel(R) Xeon(R) Processor" and "AMD EPYC" are what virtual machines of several generations
report, with and without bfloat16 instructions.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
#: Instructions that matter to matrix products, slowest first: x86, then ARM.
FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_fp16"),
    *("neon", "neon_bf16", "i8mm", "sve", "sve_bf16", "sve2", "sme"),
)
#: Other names of the same: Linux on ARM; torch.
_ALIASES = {"asimd": "neon", "bf16": "neon_bf16", "svebf16": "sve_bf16", "avx512_f": "avx512f", "fma3": "fma"}
#: The best instructions that a processor has, as part of a result's name; the first flag found decides.
_CLASSES = {
    **{
        "amx_bf16": "amx",
        "avx512_bf16": "avx512bf16",
        "avx512f": "avx512",
        "avx2": "avx2",
        "avx": "avx",
        "sse4_2": "sse42",
    },
    **{"sve_bf16": "sve-bf16", "sve": "sve", "neon_bf16": "neon-bf16", "neon": "neon"},
}
#: Names of levels in the libraries' switches, in order.
_LEVELS = (
    *("default", "sse41", "sse42", "avx", "avx2", "avx2vnni", "avx2vnni2"),
    *("avx512", "avx512vnni", "avx512bf16", "avx512fp16", "amx", "amxfp16"),
)
#: Environment variables by which a library uses less than the processor has.
SWITCHES = {
    "ONEDNN_MAX_CPU_ISA": "onednn",
    "DNNL_MAX_CPU_ISA": "onednn",
    "ATEN_CPU_CAPABILITY": "aten",
    "MKL_ENABLE_INSTRUCTIONS": "mkl",
}
#: /proc/cpuinfo of ARM has numbers only. Implementer and part, with their names.
_ARM_PARTS = {
    **{("0x41", "0xd08"): "ARM Cortex-A72", ("0x41", "0xd0c"): "ARM Neoverse-N1", ("0x41", "0xd49"): "ARM Neoverse-N2"},
    **{("0x41", "0xd40"): "ARM Neoverse-V1", ("0x41", "0xd4f"): "ARM Neoverse-V2"},
}


@dataclass(frozen=True)
class Processor:
    """What decides the speed of a CPU.

    Attributes:
        name: As it calls itself.
        identity: Vendor, family, model and stepping; empty where the system does not say.
        flags: Those of FLAGS that it has.
        switches: Environment variables in force that limit a library, with their values.
        isa: The best instructions, "avx512bf16"; under switches what they leave, with what is limited.
    """

    name: str
    identity: str
    flags: tuple[str, ...]
    switches: Mapping[str, str]
    isa: str

    @property
    def slug(self) -> str:
        """Part of a file name: "amd-epyc-avx512bf16", "amd-epyc-avx512bf16_avx2-emulated"."""
        name = re.sub(r"\((r|tm|c)\)|@.*|\b\d+-core\b|\bprocessor\b|\bcpu\b", " ", self.name.lower())
        native = _native(self.flags)
        limit = limited(native, self.switches)
        return "-".join([*re.findall(r"[a-z0-9]+", name), native]) + (f"_{limit}" if limit else "")


def detect(cpuinfo: Path | None = None, environment: Mapping[str, str] | None = None) -> Processor:
    """The processor that this process runs on.

    Args:
        cpuinfo: Linux's description of the processors; where there is no such file, torch and the system are asked.
        environment: Where switches are looked up; the process's own by default.
    """
    path, environment = cpuinfo or CPUINFO, os.environ if environment is None else environment
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    entries = _first_entry(path.read_text()) if path.exists() else {}
    words = set((entries.get("flags") or entries.get("Features") or "").split())
    if not entries:
        words = {key for key, value in capabilities.items() if value is True}
    found = {_ALIASES.get(word, word) for word in words}
    flags = tuple(flag for flag in FLAGS if flag in found)
    asked = str(capabilities.get("cpu_name", "")) if not entries else ""
    name = _name(entries) or asked or platform.processor() or platform.machine() or "unknown"
    switches = {key: environment[key] for key in SWITCHES if environment.get(key)}
    native = _native(flags)
    return Processor(name, _identity(entries), flags, switches, limited(native, switches) or native)


def limited(native: str, switches: Mapping[str, str]) -> str:
    """What is left of the instructions under switches: "avx2-emulated"; "onednn-avx2" if only that library obeys; or ""."""
    levels_of = {key: _level(value) for key, value in switches.items()}
    limits = {SWITCHES[key]: level for key, level in levels_of.items() if _below(level, native, SWITCHES[key])}
    levels = set(limits.values())
    if len(levels) == 1:
        (level,) = levels
        # ATen has one level for all kinds of AVX-512, MKL has no bfloat16: neither can or must be told of these.
        if "onednn" in limits and ("aten" in limits or level.startswith("avx512")):
            return f"{level}-emulated"
    return "_".join(f"{library}-{level}" for library, level in sorted(limits.items()))


def _level(value: str) -> str:
    """AVX512_CORE_BF16 of oneDNN is avx512bf16, AVX512_CORE_AMX amx."""
    level = value.lower().replace("_core", "").replace("_", "")
    return level.removeprefix("avx512") if level.startswith("avx512amx") else level


def _below(level: str, native: str, library: str) -> bool:
    """Whether a switch takes something away; of what it is not known, it is assumed."""
    if level in ("all", "") or level == native:
        return False
    if native not in _LEVELS or level not in _LEVELS:
        return True
    if library != "onednn" and level == "avx512":  # their highest, on processors with AMX as well
        return False
    return _LEVELS.index(level) < _LEVELS.index(native)


def _native(flags: tuple[str, ...]) -> str:
    return next((name for flag, name in _CLASSES.items() if flag in flags), platform.machine().lower() or "unknown")


def _first_entry(text: str) -> dict[str, str]:
    """Key and value of the lines about the first processor; of keys that come once for all, too."""
    entries: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if value.strip():
            entries.setdefault(key.strip(), value.strip())
    return entries


def _name(entries: Mapping[str, str]) -> str:
    if "CPU part" in entries:
        part = entries.get("CPU implementer", ""), entries["CPU part"]
        return _ARM_PARTS.get(part, f"ARM {part[0]} {part[1]}")
    return next((entries[key] for key in ("model name", "cpu model", "cpu", "uarch") if key in entries), "")


def _identity(entries: Mapping[str, str]) -> str:
    keys = (
        "vendor_id",
        "cpu family",
        "model",
        "stepping",
        "CPU implementer",
        "CPU part",
        "CPU variant",
        "CPU revision",
    )
    return " ".join(entries[key] for key in keys if key in entries)
