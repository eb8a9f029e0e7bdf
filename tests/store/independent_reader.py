"""A second reader of feature stores, written from `store/FORMAT.md` alone: nothing of agiqa, and no Zarr library.

What it needs to know and does not find there is missing there. Parquet is left to pyarrow, in the tests that compare.
"""

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

ABSENT = 2**64 - 1
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("int8", "uint8", "uint16", "int32", "int64")}
DTYPES |= {name: np.dtype(name).newbyteorder("<") for name in ("float16", "float32", "float64")}
STORED_AS = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}
PLANNED = re.compile("tokens/ids|tokens/roles")
FILLED = re.compile("features|logits|tokens/scale|layers/[0-9]{1,4}|tokens/layers_scale/[0-9]{1,4}")
OF_MODEL = ("lm_head", "basis", "scale", "layers_basis", "layers_scale", "probe")
OF_VERSION_2 = ("layers", "layer_widths", "layer_dtypes", "layer_count", "pooled", "tap")
PATH = re.compile(r"store\.zarr(/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254})+")
ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
ROOT = "store.zarr/zarr.json"


class FormatError(Exception):
    """The store is not what FORMAT.md says."""


class NotThere(FormatError):
    """The requested data are not in this store, or not yet."""


def require(fact: object, what: str) -> None:
    if not fact:
        raise FormatError(what)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """Canonical JSON, section 2."""
    return _canonical(value).encode("utf-8")  # refuses lone surrogates


def _canonical(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_text(key)}:{_canonical(value[key])}" for key in sorted(value)) + "}"
    return "[" + ",".join(map(_canonical, value)) + "]"


def _text(value: str) -> str:
    letters = [ESCAPES.get(letter) or (f"\\u{ord(letter):04x}" if letter < " " else letter) for letter in value]
    return '"' + "".join(letters) + '"'


def _float(value: float) -> str:
    """The fewest digits that give the same float, of several the nearest; put into one of the two forms."""
    require(math.isfinite(value), "NaN and infinities have no canonical JSON")
    sign = "-" if math.copysign(1.0, value) < 0 else ""
    if value == 0.0:
        return sign + "0.0"
    exact = Decimal(abs(value))
    found = next(found for places in range(1, 18) if (found := _rounded(exact, places)) is not None)
    digits, power = "".join(map(str, found.as_tuple().digits)).rstrip("0"), found.adjusted()
    if not -4 <= power < 16:
        fraction = "." + digits[1:] if len(digits) > 1 else ""
        return f"{sign}{digits[0]}{fraction}e{'-' if power < 0 else '+'}{abs(power):02d}"
    if power < 0:
        return f"{sign}0.{'0' * (-power - 1)}{digits}"
    digits = digits.ljust(power + 2, "0")
    return f"{sign}{digits[: power + 1]}.{digits[power + 1 :]}"


def _rounded(exact: Decimal, places: int) -> Decimal | None:
    """`exact` with so many digits, if that is the same float."""
    ways = (Context(prec=places, rounding=rounding).plus(exact) for rounding in (ROUND_FLOOR, ROUND_CEILING))
    same = [way for way in ways if float(way) == float(exact)]
    return min(same, key=lambda way: (abs(way - exact), way.as_tuple().digits[-1] % 2), default=None)


def item_key(conversation: list[tuple[str, str]], image: bytes = b"") -> bytes:
    """Section 6."""
    turns = ",".join(f"[{_text(role)},{_text(content)}]" for role, content in conversation)
    units = (unit for letter in f"[{turns}]" for unit in _utf16(letter))
    text = "".join(chr(unit) if unit <= 0x7E else f"\\u{unit:04x}" for unit in units).encode("ascii")
    return hashlib.sha256(struct.pack(">Q", len(text)) + text + image).digest()


def _utf16(letter: str) -> list[int]:
    code = ord(letter)
    return [code] if code < 0x10000 else [0xD800 + (code - 0x10000 >> 10), 0xDC00 + (code - 0x10000 & 0x3FF)]


def without_crc(data: bytes) -> bytes:
    body, stored = data[:-4], data[-4:]
    require(len(stored) == 4 and google_crc32c.value(body) == struct.unpack("<I", stored)[0], "a crc32c is wrong")
    return body


def hidden_of_int8(q: np.ndarray, scale: np.ndarray, *, mean: np.ndarray, rms: np.ndarray) -> np.ndarray:
    """Hidden states (tokens, D) float16 of int8 rows; section 5."""
    hidden = q.astype(np.float32) * np.multiply.outer(scale, rms) + mean
    require(hidden.dtype == np.float32 and bool((np.abs(hidden) <= 65504).all()), "it leaves the range of float16")
    return hidden.astype(np.float16)


@dataclass(frozen=True)
class ArrayForm:
    """What the Zarr v3 metadata of an array say; section 4."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    object_rows: int
    chunk_rows: int
    sharded: bool
    attributes: dict[str, Any]

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> "ArrayForm":
        require((metadata["zarr_format"], metadata["node_type"]) == (3, "array"), "it is no array of Zarr v3")
        require(metadata["fill_value"] == 0 and not metadata.get("storage_transformers"), "its fill value is not 0")
        keys = metadata["chunk_key_encoding"]
        require((keys["name"], keys["configuration"]["separator"]) == ("default", "/"), "its keys are others")
        grid = metadata["chunk_grid"]
        require(grid["name"] == "regular", "its grid is not regular")
        shape, cut = tuple(metadata["shape"]), tuple(grid["configuration"]["chunk_shape"])
        codecs, chunk = metadata["codecs"], cut
        sharded = codecs[0]["name"] == "sharding_indexed"
        if sharded:
            shard = codecs[0]["configuration"]
            require(shard["index_location"] == "end", "the index is not at the end of the shard")
            require([codec["name"] for codec in shard["index_codecs"]] == ["bytes", "crc32c"], "the index has codecs")
            codecs, chunk = shard["codecs"], tuple(shard["chunk_shape"])
        require([codec["name"] for codec in codecs] == ["bytes", "blosc", "crc32c"], "its codecs are others")
        require(cut[1:] == shape[1:] == chunk[1:] and cut[0] % chunk[0] == 0, "it is not cut along its first axis")
        return cls(shape, DTYPES[metadata["data_type"]], cut[0], chunk[0], sharded, metadata["attributes"])

    def decode(self, raw: bytes) -> np.ndarray:
        """All rows of an object."""
        index_bytes = 16 * (self.object_rows // self.chunk_rows) + 4
        if not self.sharded:
            return self._chunk(raw)
        index = np.frombuffer(without_crc(raw[-index_bytes:]), "<u8").reshape(-1, 2).tolist()
        empty = np.zeros((self.chunk_rows, *self.shape[1:]), self.dtype)
        chunks = [
            empty if (offset, length) == (ABSENT, ABSENT) else self._chunk(raw[offset : offset + length])
            for offset, length in index
        ]
        return np.concatenate(chunks)

    def _chunk(self, raw: bytes) -> np.ndarray:
        packed, shape = without_crc(raw), (self.chunk_rows, *self.shape[1:])
        size = math.prod(shape) * self.dtype.itemsize
        require(len(raw) <= size + 64, "a chunk is larger than its values")
        require(struct.unpack_from("<I", packed, 4)[0] == size, "a chunk does not hold its values")
        return np.frombuffer(blosc.decompress(packed), self.dtype).reshape(shape)


class IndependentReader:
    """A store in a folder. Everything that it lists is hashed when it is opened."""

    def __init__(self, folder: Path, *, finished_part: bool = False) -> None:
        self.folder = folder
        root = json.loads((folder / ROOT).read_bytes())
        self.attributes: dict[str, Any] = root["attributes"]
        found = (self.attributes["format"], self.attributes["version"])
        require(found in (("agiqa.features", 1), ("agiqa.features", 2)), f"it is {found}")
        self.version = 2 if {"layers", "pooled", "tap"} & set(self.attributes) else 1
        require(self.attributes["version"] == self.version, "it has the attributes of the other version")
        provenance = self.attributes["provenance"]
        require(sha256(canonical(provenance)) == self.attributes["id"], "the id is not the hash of the provenance")
        for name in ("encoding", "logical_dtype", "width"):
            require(provenance[name] == self.attributes[name], f"{name} is not that of the provenance")
        for name in OF_VERSION_2:
            require(provenance.get(name) == self.attributes.get(name), f"{name} is not that of the provenance")
        self.layers: list[str] = self.attributes.get("layers", ["last"])
        self.pooled: list[str] = self.attributes.get("pooled", [])
        self.has_lm_head = "tap" not in self.attributes and self.layers[-1] == "last"
        manifest = folder / "MANIFEST.json"
        self.manifest = json.loads(manifest.read_bytes()) if manifest.exists() else None
        self.plan = None if self.manifest else json.loads((folder / "commits/plan.json").read_bytes())
        self.records: dict[str, dict[str, dict[str, Any]] | None] = {}
        if self.manifest is None:
            self._open_unfinished(finished_part=finished_part)
        else:
            self._open_listed()

    def _open_listed(self) -> None:
        manifest = self.manifest
        kind = [manifest[key] for key in ("format", "version")]
        require(kind == ["agiqa.features", self.version], "it is no manifest of this store")
        require(manifest["id"] == self.attributes["id"], "the manifest is that of another store")
        require((manifest["state"], "units" in manifest) in (("complete", False), ("partial", True)), "a wrong state")
        self.units = set(manifest.get("units", range(self.attributes["units"])))
        self.listed = self._entries(manifest["objects"])
        require(ROOT in self.listed, "the metadata of the root are not listed")
        files = {path.relative_to(self.folder).as_posix() for path in self.folder.glob("store.zarr/**/*")}
        files = {name for name in files if (self.folder / name).is_file()}
        require(files == set(self.listed), "files and listing differ")
        self._check_table(manifest)

    def _open_unfinished(self, *, finished_part: bool) -> None:
        require(finished_part, "it is not sealed")
        require(self.plan["attributes"] == sha256(canonical(self.attributes)), "its attributes were not planned so")
        units = range(self.attributes["units"])
        self.units = {unit for unit in units if (self.folder / f"commits/{unit:08d}.json").exists()}
        for record in sorted((self.folder / "commits").glob("[0-9mp]*.json")):
            self.records[record.stem] = self._entries(json.loads(record.read_bytes())["objects"])
        self._check_table(self.plan)

    def _check_table(self, listing: dict[str, Any]) -> None:
        accepted = [listing[key]["sha256"] for key in ("labels", "labels_next") if key in listing]
        require(sha256((self.folder / "items.parquet").read_bytes()) in accepted, "the item table is another")

    def _entries(self, entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for entry in entries:
            path = entry["path"]
            require(PATH.fullmatch(path) is not None and len(path) <= 1000, f"{path!r} is no path of an object")
            raw = (self.folder / path).read_bytes()
            require((len(raw), sha256(raw)) == (entry["bytes"], entry["sha256"]), f"{path} has other bytes")
        found = {entry["path"]: entry for entry in entries}
        require(len(found) == len(entries), "an object is listed twice")
        return found

    def form(self, name: str) -> ArrayForm:
        """Shape, dtype and codecs of an array."""
        path = f"store.zarr/{name}/zarr.json"
        if not (self.folder / path).exists():
            raise NotThere
        return ArrayForm.of(json.loads((self.folder / path).read_bytes()))

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of an array in the bits of the store; all of one unit, where it has row addresses."""
        form = self.form(name)
        parts = [np.zeros((0, *form.shape[1:]), form.dtype)]
        while start < stop:
            number = start // form.object_rows
            end = min(stop, (number + 1) * form.object_rows)
            first = number * form.object_rows
            parts.append(self._object(name, form, number)[start - first : end - first])
            start = end
        return np.concatenate(parts)

    def _object(self, name: str, form: ArrayForm, number: int) -> np.ndarray:
        path = "/".join(["store.zarr", name, "c", str(number), *["0"] * (len(form.shape) - 1)])
        entry = self._listing(name, form, number).get(path)
        here = (self.folder / path).exists()
        require(here == (entry is not None), f"{path} and its listing disagree")
        if entry is None:
            return np.zeros((form.object_rows, *form.shape[1:]), form.dtype)
        raw = (self.folder / path).read_bytes()
        require(len(raw) == entry["bytes"], f"{path} has another size")
        return form.decode(raw)

    def _listing(self, name: str, form: ArrayForm, number: int) -> dict[str, dict[str, Any]]:
        """The listing that says whether a missing object is zero; section 3."""
        unit = number * form.object_rows // self.attributes["unit_rows"]
        if self.manifest is not None:
            if (PLANNED.fullmatch(name) or FILLED.fullmatch(name)) and unit not in self.units:
                raise NotThere
            return self.listed
        group = name.partition("/")[0]
        record = "model" if group in OF_MODEL else "plan"
        record = f"{unit:08d}" if FILLED.fullmatch(name) else record
        if record not in self.records:
            raise NotThere
        return self.records[record]

    def whole(self, name: str) -> np.ndarray:
        """All of an array without row addresses."""
        return self.rows(name, 0, self.form(name).shape[0])

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First row of each item, and the row after its last; section 3 says how they must lie."""
        starts, counts, units = (self.whole(f"index/{name}").tolist() for name in ("row_start", "n_tokens", "unit"))
        unit_rows, before, end = self.attributes["unit_rows"], -1, 0
        for start, count, unit in zip(starts, counts, units, strict=True):
            require(before <= unit < self.attributes["units"], "units descend")
            require(start == (end if unit == before else unit * unit_rows), "an item has another place")
            before, end = unit, start + count
            require(end <= (unit + 1) * unit_rows, "an item crosses a unit")
            require(not self.pooled or count == len(self.pooled), "an item has another number of poolings")
        return [(start, start + count) for start, count in zip(starts, counts, strict=True)]

    def of_item(self, item: int, name: str) -> np.ndarray:
        """The rows of an item in an array with row addresses, as they are stored."""
        if self.manifest is not None and int(self.whole("index/unit")[item]) not in self.units:
            raise NotThere  # also where it has no rows
        return self.rows(name, *self.spans[item])

    def prefix(self, item: int, name: str) -> tuple[np.ndarray, str | None]:
        """Section 6: the rows of the item as the shorter conversation `name`, and the author of its texts."""
        names, counts = self.attributes["provenance"]["prefixes"], self.whole("index/prefixes")[item]
        total = int(self.whole("index/n_tokens")[item])
        require(counts.shape == (len(names),), "there is a column for each shorter conversation")
        require((np.diff([0, *counts.tolist(), total]) >= 0).all(), "the numbers of rows of an item do not descend")
        place = names.index(name)
        author = (None, "teacher", "teacher-blind", "model")[self.whole("index/prefix_authors")[item, place]]
        return self.features(item)[: counts[place]], author

    def prefix_key(self, item: int, name: str) -> bytes:
        """Section 6: the item key of the shorter conversation `name`; of the whole one, if the store has no other."""
        if not (self.folder / "store.zarr/index/prefix_keys/zarr.json").exists():
            return self.whole("index/item_key")[item].tobytes()
        place = self.attributes["provenance"]["prefixes"].index(name)
        return self.whole("index/prefix_keys")[item, 32 * place : 32 * place + 32].tobytes()

    def features(self, item: int) -> np.ndarray:
        """The rows of an item in the bits of `logical_dtype`, int8 made hidden states again; section 5."""
        return self.layer(item, self.layers[-1])

    def layer(self, item: int, name: str) -> np.ndarray:
        """The rows of an item in a layer, in the bits of its logical dtype; sections 5 and 11."""
        is_other, dtype = name != self.layers[-1], self.layer_dtype(name)
        rows = self.of_item(item, f"layers/{name}" if is_other else "features")
        width = self.attributes.get("layer_widths", {}).get(name, self.attributes["width"])
        require(rows.shape[1] == width, "a layer has another width")
        if self.attributes["encoding"] != "int8":
            require(rows.dtype == STORED_AS[dtype], "features have another dtype")
            return rows
        require(dtype == "float16", "int8 is read as float16")
        scale = self.of_item(item, f"tokens/layers_scale/{name}" if is_other else "tokens/scale")
        group = f"layers_scale/{name}" if is_other else "scale"
        return hidden_of_int8(rows, scale, mean=self.whole(f"{group}/mean"), rms=self.whole(f"{group}/rms"))

    def layer_dtype(self, name: str) -> str:
        """The logical dtype of a layer; section 11."""
        return self.attributes.get("layer_dtypes", {}).get(name, self.attributes["logical_dtype"])

    def floats(self, bits: np.ndarray, dtype: str | None = None) -> np.ndarray:
        """Values of bits in the logical dtype `dtype`, or else that of the store, float32."""
        if (dtype or self.attributes["logical_dtype"]) == "bfloat16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return bits.astype(np.float32)

    def lm_head_sha256(self) -> str:
        """sha256 of the bits of W_lm."""
        return sha256(self.whole("lm_head/weight").tobytes())

    def basis_id(self, layer: str | None = None) -> str:
        """The id of the basis, from its content; of another layer, if it is given."""
        group = "basis" if layer is None else f"layers_basis/{layer}"
        stated = self.form(f"{group}/{'q' if layer is None and self.has_lm_head else 'map'}").attributes
        content = {name: stated[name] for name in ("method", "rank", "lm_head_sha256", "calibration")}
        return sha256(canonical({**content, "map": sha256(self.whole(f"{group}/map").tobytes())}))

    def scale_id(self, layer: str | None = None) -> str:
        """The id of the scale, from its content; of another layer, if it is given."""
        group = "scale" if layer is None else f"layers_scale/{layer}"
        vectors = {name: sha256(self.whole(f"{group}/{name}").tobytes()) for name in ("mean", "rms")}
        return sha256(canonical({"calibration": self.form(f"{group}/mean").attributes["calibration"], **vectors}))
