"""Which environment variables go along to the ranks of other hosts, and what may be shown of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from baichuan_sft.errors import UserError

# What goes along, by its beginning and by its full name.
PREFIXES = (
    *("NCCL_", "GLOO_", "HF_", "TORCH_", "TORCHINDUCTOR_", "CUDA_", "OMP_", "PYTHON"),
    *("BAICHUAN_SFT_", "TOKENIZERS_", "DS_", "TRITON_", "LANG", "LC_"),
)
NAMES = "PATH LD_LIBRARY_PATH http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY".split()
# Set for each rank anew: a value from an outer launcher would send ranks to another run.
OWN = ("BAICHUAN_SFT_WORLD", "BAICHUAN_SFT_STATUS", "BAICHUAN_SFT_RUN", "BAICHUAN_SFT_LAUNCH")
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def forwarded(environment: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    """What goes along: the allow-list, and what ``--env`` names; a secret only when named.

    Raises:
        UserError: a named variable is not set.
    """
    named = list(named)
    absent = [name for name in named if name not in environment]
    if absent:
        raise UserError(f"--env {absent[0]}: is not set here; export it first")
    chosen = {
        name: value
        for name, value in environment.items()
        if (name.startswith(PREFIXES) or name in NAMES) and name not in OWN and not SECRET.search(name)
    }
    return chosen | {name: environment[name] for name in named}


def shown(name: str, value: str) -> str:
    """``NAME=value``, without what nobody should read over a shoulder."""
    if SECRET.search(name):
        return f"{name}=***"
    return f"{name}=" + re.sub(r"//[^/@\s]+@", "//***@", value)
