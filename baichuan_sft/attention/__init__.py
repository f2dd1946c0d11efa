"""Attention backends: how a layer attends, and what it is told about the batch in place of a T x T mask.

B rows, T tokens of a row, N heads, H head width; a run is tokens of one row, side by side, that see each
other: a packed conversation, an unpacked one, or padding.

    backend    mask                        where it is used
    eager      T x T                       the reference: scores written out
    sdpa       T x T, none where causal    chat, and whatever a Layout cannot say
    segments   none; ALiBi: of one run     CPUs: one SDPA call per run
    augmented  none                        the same, ALiBi carried by extra head dimensions
    varlen     none                        GPUs, fp16 and bf16: torch's variable-length flash kernel
    flex       blocks of 128 x 128         GPUs, ALiBi: FlexAttention with the bias inside the kernel
    xformers   none                        GPUs older than varlen's, where xformers is installed

Importing this module makes the names known to transformers (``attn_implementation="segments"``).
"""

from baichuan_sft.attention.backends import BACKENDS, choose

__all__ = ["BACKENDS", "choose"]
