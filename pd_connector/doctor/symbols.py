"""What the C extension looks up in Ascend's libraries: compared with csrc and docs/ascend.md by tests/native."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """``needed``: without one of these the library is too old for us. ``optional``: there is another way."""

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


LIBRARIES = (
    Library(
        "libascendcl.so",
        (
            "aclrtSetDevice",
            "aclrtGetDevice",
            "aclrtGetCurrentContext",
            "aclrtSetCurrentContext",
            "aclrtMalloc",
            "aclrtFree",
            "aclrtHostRegister",
            "aclrtHostUnregister",
            "aclrtMemcpyAsync",
            "aclrtCreateStream",
            "aclrtDestroyStream",
            "aclrtSynchronizeStreamWithTimeout",
            "aclrtPointerGetAttributes",
        ),
        ("aclrtMemcpy2dAsync", "aclrtMemcpyBatchAsync", "aclGetRecentErrMsg"),
    ),
    Library("libmetadef.so", ("_ZN2ge12AscendStringC1EPKc", "_ZNK2ge12AscendStringltERKS0_")),
    Library(
        "libcann_hixl.so",
        (
            "_ZN4hixl4HixlC1Ev",
            "_ZN4hixl4HixlD1Ev",
            "_ZN4hixl4Hixl10InitializeERKN2ge12AscendStringERKSt3mapIS2_S2_St4lessIS2_ESaISt4pairIS3_S2_EEE",
            "_ZN4hixl4Hixl8FinalizeEv",
            "_ZN4hixl4Hixl11RegisterMemERKNS_7MemDescENS_7MemTypeERPv",
            "_ZN4hixl4Hixl13DeregisterMemEPv",
            "_ZN4hixl4Hixl7ConnectERKN2ge12AscendStringEi",
            "_ZN4hixl4Hixl10DisconnectERKN2ge12AscendStringEi",
            "_ZN4hixl4Hixl12TransferSyncERKN2ge12AscendStringENS_10TransferOpERKSt6vectorINS_14TransferOpDescESaIS7_EEi",
        ),
    ),
    Library(
        "libhccl.so",
        (
            "HcclGetRootInfo",
            "HcclCommInitRootInfo",
            "HcclBatchSendRecv",
            "HcclCommDestroy",
            "HcclGetErrorString",
        ),
    ),
)


@dataclass(frozen=True)
class Found:
    """``problem``: why the library cannot be opened, else empty. Of its symbols those that are not there."""

    library: str
    problem: str = ""
    missing: tuple[str, ...] = ()
    missing_optional: tuple[str, ...] = ()


def look() -> list[Found]:
    """Opens every library, as the extension would; they stay open, for closing them is not safe."""
    return [_look(library) for library in LIBRARIES]


def _look(library: Library) -> Found:
    try:
        opened = ctypes.CDLL(library.name)
    except OSError as error:
        return Found(library.name, str(error))
    absent = {name for name in (*library.needed, *library.optional) if not hasattr(opened, name)}
    return Found(
        library.name,
        missing=tuple(name for name in library.needed if name in absent),
        missing_optional=tuple(name for name in library.optional if name in absent),
    )
