"""The SBOM of a wheel, SPDX 2.3 as JSON, put into its .dist-info/sboms (PEP 770): `python
.ci/sbom.py WHEEL...`. It is validated before it is written, by spdx-tools, which must be there."""

import base64
import hashlib
import sys
import tempfile
import zipfile
from datetime import datetime, timezone
from email.message import Message
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from spdx_tools.spdx.model import (
    Actor,
    ActorType,
    Checksum,
    ChecksumAlgorithm,
    CreationInfo,
    Document,
    ExternalPackageRef,
    ExternalPackageRefCategory,
    Package,
    Relationship,
    RelationshipType,
    SpdxNoAssertion,
)
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document
from spdx_tools.spdx.writer.json.json_writer import write_document_to_file

COMPILED_IN = ("pybind11",)  # its headers are part of _C


def package(name: str, version: str | None = None, **about: object) -> Package:
    """A package of PyPI."""
    pin = f"@{version}" if version else ""
    purl = f"pkg:pypi/{canonicalize_name(name)}{pin}"
    known = ExternalPackageRef(ExternalPackageRefCategory.PACKAGE_MANAGER, "purl", purl)
    return Package(
        f"SPDXRef-{canonicalize_name(name)}", name, SpdxNoAssertion(), version=version,
        files_analyzed=False, external_references=[known], **about,
    )  # fmt: skip


def document(metadata: Message, digest: str, compiled: bool) -> Document:
    """The wheel, what it asks for, and what was compiled into it.

    Args:
        digest: SHA-256 of the wheel as it was built, in hexadecimal.
    """
    name, version = metadata["Name"], metadata["Version"]
    own = package(name, version, checksums=[Checksum(ChecksumAlgorithm.SHA256, digest)])
    asked = [Requirement(x) for x in metadata.get_all("Requires-Dist", [])]
    extras = set(metadata.get_all("Provides-Extra", []))
    found, relations = {own.spdx_id: own}, []
    for one in asked:
        optional = one.marker is not None and any(e in str(one.marker) for e in extras)
        if canonicalize_name(one.name) == canonicalize_name(name):
            continue  # an extra that names others
        other = package(one.name, comment=f"asked for as {one}")
        if optional:
            kind = RelationshipType.OPTIONAL_DEPENDENCY_OF
            relation = Relationship(other.spdx_id, kind, own.spdx_id)
        else:
            relation = Relationship(own.spdx_id, RelationshipType.DEPENDS_ON, other.spdx_id)
        if found.setdefault(other.spdx_id, other) is other:
            relations.append(relation)
    for one in COMPILED_IN * compiled:
        other = found.setdefault(f"SPDXRef-{one}", package(one))
        kind = RelationshipType.STATIC_LINK
        relations.append(Relationship(own.spdx_id, kind, other.spdx_id))
    about = CreationInfo(
        "SPDX-2.3", "SPDXRef-DOCUMENT", f"{name}-{version}",
        f"https://spdx.org/spdxdocs/{name}-{version}-{digest}",
        [Actor(ActorType.TOOL, f"{name}-sbom")], datetime.now(timezone.utc).replace(microsecond=0),
    )  # fmt: skip
    described = Relationship("SPDXRef-DOCUMENT", RelationshipType.DESCRIBES, own.spdx_id)
    return Document(about, [*found.values()], relationships=[described, *relations])


def add(wheel: Path) -> Path:
    """Put the SBOM into a wheel, by which its RECORD is written anew; the wheel.

    Raises:
        ValueError: the SBOM is not as SPDX 2.3 has it.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (place,) = (x for x in names if x.count("/") == 1 and x.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(place).decode())
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    compiled = any(x.startswith("elva_kernels/_C.") for x in names)
    made = document(metadata, digest, compiled)
    if faults := validate_full_spdx_document(made):
        raise ValueError("\n".join(fault.validation_message for fault in faults))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"{metadata['Name']}.spdx.json"
        write_document_to_file(made, str(file))
        put(wheel, f"{Path(place).parent}/sboms/{file.name}", file.read_bytes())
    return wheel


def put(wheel: Path, name: str, content: bytes) -> None:
    """Add a file to a wheel, and its line to RECORD; everything else is copied as it is."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    line = f"{name},sha256={digest},{len(content)}\n"
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            kept = old.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                kept = kept.rstrip(b"\r\n") + b"\n" + line.encode()
            new.writestr(info, kept)
        new.writestr(name, content)
    partial.replace(wheel)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(f"SBOM, SPDX 2.3: in {add(Path(path))}")
