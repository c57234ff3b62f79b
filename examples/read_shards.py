"""Read a cache with the standard library and numpy alone: for sample, moments, embeds in Shards(folder): ..."""

import json
import re
import sys
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import numpy as np

MANIFEST = {"format", "version", "backend", "model", "series", "tables", "unconditional", "checksum"}
SHARD = "(-[1-9][0-9]*(x[1-9][0-9]*)*)?-[0-9]{5,9}"
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}


def check(truth, what):
    if not truth:
        raise ValueError(what)


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class Shards:
    def __init__(self, root):
        self.root = Path(root)
        try:
            self.open()
        except ValueError:
            self.open()  # a writer may just have committed
        self.places = {name: self.index(name, value) for name, value in self.manifest["series"].items()}
        for row in [*self.samples, *self.validation, {"text": self.manifest["unconditional"]}]:
            uses = [("text", row["text"]), ("latents", row.get("latents")), ("images", row.get("image"))]
            uses += [("images", key) for key in row.get("images", ())]
            check(all(k is None or k in self.places.get(s, ()) for s, k in uses), f"missing entry: {row}")

    def open(self):
        self.manifest = value = json.loads((self.root / "manifest.json").read_bytes())
        check((value.get("version"), value.get("backend")) == (1, "webdataset"), "not tar, version 1")
        proof = sha256(canonical({k: v for k, v in value.items() if k != "checksum"})).hexdigest()
        check(proof == value["checksum"] and value.keys() == MANIFEST, "the manifest is damaged")
        self.samples, self.failures = self.table("samples.jsonl"), self.table("failures.jsonl")
        self.validation = self.table("validation.jsonl") if "validation.jsonl" in value["tables"] else []

    def table(self, name):
        for path in (p for p in (self.root / name, self.root / f"{name}.next") if p.is_file()):
            data, wanted = path.read_bytes(), self.manifest["tables"][name]
            if sha256(data).hexdigest() == wanted["sha256"] and data.count(b"\n") == wanted["rows"]:
                return [json.loads(line) for line in data.split(b"\n")[:-1]]
        raise ValueError(f"{name} is damaged")

    def index(self, series, record):
        check(re.fullmatch("[a-z][a-z0-9_]{0,31}", series), "not the name of a series")
        found = {}
        for shard in record["shards"]:
            check(re.fullmatch(series + SHARD, shard["name"]), "not the name of a shard")
            tar = self.root / series / f"{shard['name']}.tar"
            data = tar.with_suffix(".index.jsonl").read_bytes()
            *lines, last, _ = data.split(b"\n")
            end = {name: shard[name] for name in ("bytes", "entries", "sha256")}
            end["lines_sha256"] = sha256(data[: -len(last) - 1]).hexdigest()
            sealed = canonical({"end": end, "line_crc32": crc32(canonical({"end": end}))})
            whole = last == sealed and sha256(data).hexdigest() == shard["index_sha256"]
            check(whole and len(lines) == end["entries"], f"the index of {tar} is damaged")
            check(tar.is_file() and tar.stat().st_size == end["bytes"], f"{tar} has another size")
            for key, members in ((row["key"], row["members"]) for row in map(json.loads, lines)):
                check(re.fullmatch("[0-9a-f]{32}", key) and key not in found, "a key is wrong or comes twice")
                check([m["name"] for m in members] == [f"{key}.safetensors", f"{key}.json"], "wrong members")
                check(all(0 <= m["offset"] <= m["offset"] + m["size"] <= end["bytes"] for m in members), key)
                found[key] = [(tar, m["offset"], m["size"], m["crc32"]) for m in members]
        return found

    def read(self, series, key):
        members = self.places[series][key]
        data = [np.fromfile(tar, "u1", size, offset=offset).tobytes() for tar, offset, size, _ in members]
        check([(len(d), crc32(d)) for d in data] == [m[2:] for m in members], f"{series} {key} is damaged")
        start, found = 8 + int.from_bytes(data[0][:8], "little"), {}
        for name, tensor in json.loads(data[0][8:start]).items():
            values = np.frombuffer(data[0][start:][slice(*tensor["data_offsets"])], DTYPES[tensor["dtype"]])
            values = (values.astype("<u4") << 16).view("<f4") if tensor["dtype"] == "BF16" else values
            found[name] = values.reshape(tensor["shape"]).astype(np.float32)
        return found, json.loads(data[1])

    def __iter__(self):
        size = 4 if self.manifest["series"]["latents"]["fingerprint"].get("vae_dtype") == "bfloat16" else 2
        for row in self.samples:
            found = self.read("latents", row["latents"])[0]
            if "moments_8bit" in found:
                low, high, codes = np.split(found["moments_8bit"], 3)
                mean = ((low + 256 * high) * 256 ** (size - 2)).astype(f"<u{size}").view(f"<f{size}")
                found["moments"] = np.concatenate([mean, codes * np.float32(50 / 255) - 30])
            yield row, found["moments"], self.read("text", row["text"])[0]["prompt_embeds"]


if __name__ == "__main__":
    for sample, moments, embeds in Shards(sys.argv[1]):
        print(sample["id"], moments.shape, embeds.shape, sample["caption"])
