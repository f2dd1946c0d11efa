"""GPUs, InfiniBand and processes of one host, from nvidia-smi, /sys and /proc."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from baichuan_sft import machine

# nvidia-smi's name -> ours; "[N/A]" stands where a device has no such thing
QUERY = {
    "name": "name",
    "memory.used": "used_mib",
    "compute_cap": "capability",
    "driver_version": "driver",
    "mig.mode.current": "mig",
    "ecc.errors.uncorrected.volatile.total": "ecc_errors",
}
NVIDIA, DISPLAY = "0x10de", "0x03"  # PCI vendor, and the class of GPUs
RANK = re.compile(r"fine-tune\.py|baichuan[-_]sft(\.cli)? train|baichuan_sft\.train")
SMI_SECONDS = 30  # a driver in trouble answers late or never


def devices(ask: dict[str, Any]) -> dict[str, Any]:
    """GPUs that a run would see, with what is on them; ``fault`` where there is one and no driver answers."""
    found: dict[str, Any] = {"gpus": [], "fault": "", "cores": len(os.sched_getaffinity(0))}
    found["infiniband"] = infiniband()
    try:
        found["gpus"] = _visible(_query("gpu", list(QUERY)))
        found["busy"] = _query("compute-apps", ["pid", "used_memory", "process_name"])
    except FileNotFoundError:
        found["fault"] = "an NVIDIA device, but no nvidia-smi" if _has_nvidia() else ""
    except subprocess.TimeoutExpired:
        found["fault"] = f"nvidia-smi gave no answer in {SMI_SECONDS} s"
    except subprocess.CalledProcessError as error:
        said = (error.stdout or error.stderr).strip().splitlines()
        found["fault"] = said[0] if said else f"nvidia-smi ended with code {error.returncode}"
    return found


def _query(what: str, fields: list[str]) -> list[dict[str, str]]:
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SMI_SECONDS)
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip([QUERY.get(name, name) for name in fields], row)) for row in rows]


def _visible(gpus: list[dict[str, str]]) -> list[dict[str, str]]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = re.findall(r"\d+", chosen or "")
    if chosen is None or (chosen and "".join(re.split(r"[\d,\s]+", chosen))):  # unset, or names of devices
        return gpus
    return [gpus[int(number)] for number in numbers if int(number) < len(gpus)]


def _has_nvidia() -> bool:
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text()
            if vendor == NVIDIA and kind.startswith(DISPLAY):
                return True
    return False


def infiniband() -> list[str]:
    """Names of InfiniBand and RoCE devices with an active port."""
    states = Path("/sys/class/infiniband").glob("*/ports/*/state")
    return sorted({path.parts[-4] for path in states if "ACTIVE" in path.read_text()})


def leftovers(ask: dict[str, Any]) -> list[dict[str, Any]]:
    """Processes of training that already run here."""
    commands = {pid: machine.command_line(pid) for pid in machine.processes()}
    return [{"pid": pid, "command": line} for pid, line in commands.items() if RANK.search(line)]
