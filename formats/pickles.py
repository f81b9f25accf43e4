"""What ``torch.save`` wrote, read without running anything in it."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First in the files of PyTorch before 1.6, a chain of pickles."""


def load_pickle(path: str | Path, *, lazily: bool = False) -> dict[str, Any]:
    """What ``torch.save`` wrote, a dictionary, on the CPU; ``lazily`` leaves tensors on the disk until they are used.

    Only tensors, plain values and the command line (``argparse.Namespace``) that many codes save beside them are known.

    Raises:
        ValueError: it is something else.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily or None)
    except Exception as error:  # damaged bytes make the readers raise almost anything
        raise unreadable(path, error) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not weights by name")
    return found


def unreadable(path: str | Path, error: Exception) -> ValueError:
    """One line that says what the file is, as far as its beginning tells."""
    with Path(path).open("rb") as file:
        head = file.read(64).lstrip()
    told = str(error).partition("\n")[0]
    remedy = "save the state_dict() alone, by safetensors or torch.save, where it is trusted: loading it runs its code"
    if head[:1] == b"<":
        reason = "it is a web page: the download asked for something else"
    elif head.startswith(b"version https://git-lfs"):
        reason = "it is Git LFS's pointer to the file, not the file: fetch it with git lfs pull"
    elif not head:
        reason = "it is empty"
    elif found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        reason = f"it holds Python objects such as {found[1]}, which are not loaded: {remedy}"
    elif head.startswith(b"PK") and "zip archive" in str(error):
        reason = "it is damaged or cut short"
    elif head[:1] == b"\x80" and not head.startswith(pickle.dumps(LEGACY_MAGIC, protocol=2)):
        reason = f"it is a plain pickle, which is not loaded: {remedy}"
    elif "TorchScript" in told:
        reason = f"it is a TorchScript program, which is not loaded: {remedy}"
    # torch's own advice is to read the file unsafely
    elif "weights_only" in str(error) or not isinstance(error, RuntimeError | SafetensorError | OSError):
        reason = f"it is another kind of file, damaged, or a pickle, which is not loaded: {remedy}"
    else:
        reason = told or type(error).__name__
    return ValueError(f"{path} cannot be read as weights, a .safetensors or .pth of tensors ({reason})")
