"""A fused user as one small file: a taste made ready for one adapter, without its pictures.

The file holds the user's tensors and says which adapter they are for, by name and checksum: with another adapter the
same numbers would paint somebody else. safetensors, with one JSON header entry `prefgen_user`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .adapter import AdapterFile, UserAdapter
from .adapter_file import load_adapter_once
from .errors import AdapterError
from .fusion import FusedUser
from .ip_adapter import ImageAdapter

ENTRY = "prefgen_user"
FORMAT_VERSION = 1
USER, NO_USER = ("user", "no_user")


@dataclass(frozen=True)
class UserHeader:
    """What a user file says of itself.

    adapter, digest: name and SHA-256 of the adapter's file. negative: the unconditional half gets disliked pictures.
    taste: what it was made of, such as sea@1a2b3c4d; "" where nobody said.
    """

    format_version: int
    name: str
    adapter: str
    digest: str
    negative: bool = False
    taste: str = ""


def user_bytes(user: FusedUser, name: str, taste: str = "") -> bytes:
    """A user file's bytes. taste: in place of what the user itself says of it. Raises AdapterError for an adapter that
    was not read from a file, and for a user with numbers that no file would be read with."""
    file = file_of(user.adapter)
    if not all(tensor.isfinite().all() for tensor in (user.vector, user.no_user) if tensor is not None):
        raise AdapterError("This user has numbers that are not finite, and was not saved: fuse it anew.")
    header = UserHeader(FORMAT_VERSION, name, file.path.name, file.digest, user.negative, taste or user.taste)
    tensors = {USER: user.vector.detach().float().cpu().contiguous()}
    if user.no_user is not None:
        tensors[NO_USER] = user.no_user.detach().float().cpu().contiguous()
    return save(tensors, metadata={ENTRY: json.dumps(asdict(header))})


def file_of(adapter: UserAdapter | ImageAdapter) -> AdapterFile:
    """The file that an adapter was read from."""
    if adapter.file is None:
        raise AdapterError("This user's adapter was not read from a file: fuse the user with an adapter from a file.")
    return adapter.file


def load_user(path: str | os.PathLike, adapters: Mapping[str, Path]) -> FusedUser:
    """The user of a file, with its adapter, which is looked for among `adapters` (by name first, then by checksum).

    Raises AdapterError with one sentence for a file that can't be used and for an adapter that isn't there.
    """
    path = Path(path)
    header, tensors = read_user(path)
    adapter = load_adapter_once(adapter_of(header, adapters))
    vector = tensors[USER]
    no_user = tensors.get(NO_USER)
    if not fits(vector, adapter) or (no_user is not None and no_user.shape != vector.shape):
        raise AdapterError(f"{path.name} is damaged: its numbers don't fit its own adapter. Save the user again.")
    return FusedUser(vector, adapter, no_user, header.negative, header.taste)


def read_user(path: Path) -> tuple[UserHeader, dict[str, torch.Tensor]]:
    """(header, tensors) of a user file. Raises AdapterError."""
    try:
        with safe_open(path, "pt") as file:
            entry = (file.metadata() or {}).get(ENTRY)
            tensors = {key: file.get_tensor(key) for key in file.keys() if key in (USER, NO_USER)}  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AdapterError(f"{path.name} can't be read as a user file: save the user again.") from error
    if entry is None:
        raise AdapterError(f"{path.name} is no user file: choose one that Save User has written.")
    header = _header_of(entry, path)
    floats = all(tensor.is_floating_point() for tensor in tensors.values())
    # Before they are looked at: torch compares no numbers of 8 bits.
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    if USER not in tensors or not floats or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise AdapterError(f"{path.name} is damaged: it holds no user's numbers. Save the user again.")
    return header, tensors


def _header_of(entry: str, path: Path) -> UserHeader:
    """The header that a file's entry holds. Raises AdapterError."""
    try:
        raw = json.loads(entry)
        if int(raw["format_version"]) > FORMAT_VERSION:
            raise AdapterError(f"{path.name} was written by a newer PrefGen: update PrefGen.")
        header = UserHeader(**{field.name: raw[field.name] for field in fields(UserHeader) if field.name in raw})
        texts = (header.name, header.adapter, header.digest, header.taste)
        if not all(isinstance(text, str) for text in texts) or not isinstance(header.negative, bool):
            raise TypeError("an entry of another type")
    except AdapterError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path.name} has a mangled header: save the user again.") from error
    return header


_digests: dict[AdapterFile, str] = {}


def adapter_of(header: UserHeader, adapters: Mapping[str, Path]) -> Path:
    """The adapter's file that a user is for; those of the same name first, since a checksum reads all of a file.

    Raises AdapterError where none is.
    """
    named_first = sorted(adapters.values(), key=lambda path: path.name != header.adapter)
    unread: Path | None = None
    for path in named_first:
        if not path.is_file():
            continue
        try:
            file = AdapterFile.of(path)
            if file not in _digests:
                _digests[file] = file.digest
        except (AdapterError, OSError):
            # Another's file, or one that is being copied: nothing to do with this user unless no other file is its.
            unread = unread or path
            continue
        if _digests[file] == header.digest:
            return path
    if unread is not None:
        raise AdapterError(
            f"The user {header.name} is for the adapter {header.adapter}, and {unread.name} could not be read to see "
            "whether it is that one: let ComfyUI read it, or wait until it has been copied, and queue again."
        )
    taste = f" {header.taste}" if header.taste else ""
    raise AdapterError(
        f"The user {header.name} is for the adapter {header.adapter}, which isn't here as it was: put that file back, "
        f"or encode the taste{taste} anew and fuse it with another adapter."
    )


def fits(vector: torch.Tensor, adapter: UserAdapter | ImageAdapter) -> bool:
    """Whether a user's tensor has the shape that an adapter reads."""
    if isinstance(adapter, ImageAdapter):
        return vector.ndim in (2, 3) and vector.shape[-1] == adapter.header.image_width
    return tuple(vector.shape) == (adapter.header.user_width,)


def blend_users(users: Sequence[FusedUser], weights: Sequence[float]) -> FusedUser:
    """Several users of one adapter as one: their weighted mean, the weights brought to a sum of 1.

    Blended is e_u, where the adapter has one, else what it reads of pictures. Raises AdapterError for users of
    different adapters, or of different numbers of pictures, and for weights without a positive sum.
    """
    total = float(sum(weights))
    if min(weights) < 0 or total <= 0:
        raise AdapterError("The weights of Blend Users are 0 or more, and at least one is above 0.")
    first = users[0]
    for user in users[1:]:
        if user.adapter is not first.adapter and file_of(user.adapter).digest != file_of(first.adapter).digest:
            raise AdapterError(
                f"These users are for different adapters ({first.adapter.name} and {user.adapter.name}): fuse both "
                "with the same one."
            )
        if user.vector.shape != first.vector.shape:
            raise AdapterError(
                "These users are made of different numbers of pictures: fuse them with a pooling that makes one of "
                "all, such as push away."
            )
    shares = [weight / total for weight in weights]
    vector = sum(share * user.vector.float() for share, user in zip(shares, users, strict=True))
    no_user = None
    if any(user.no_user is not None for user in users):
        zeros = torch.zeros_like(first.vector).float()
        parts = [zeros if user.no_user is None else user.no_user.float() for user in users]
        no_user = sum(share * part for share, part in zip(shares, parts, strict=True))
    return FusedUser(vector, first.adapter, no_user, any(user.negative for user in users), mixed_name(users, shares))


def mixed_name(users: Sequence[FusedUser], shares: Sequence[float]) -> str:
    """What users are made of together, such as "0.75 sea@1a2b3c4d + 0.25 city"; "" where nobody said of any."""
    if not any(user.taste for user in users):
        return ""
    return " + ".join(f"{share:.3g} {user.taste or 'unnamed'}" for share, user in zip(shares, users, strict=True))
