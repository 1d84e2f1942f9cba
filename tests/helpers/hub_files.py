"""A small data set as the hub and a mirror hold it: four shards of thirty documents, and a card."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq

NAME = "karpathy/climbmix-400b-shuffle"
SHARDS = ("shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet", "shard_06542.parquet")


def parquet(first):
    sink = pa.BufferOutputStream()
    texts = [f"document {n} of a shard" for n in range(first, first + 30)]
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=10, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


FILES = {f"datasets/{NAME}/{name}": parquet(1000 * number) for number, name in enumerate(SHARDS)}
FILES[f"datasets/{NAME}/README.md"] = b"a card"
SUMS = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in FILES.items()).encode()
MIRROR = FILES | {"SHA256SUMS": SUMS}


def api():
    siblings = []
    for path, data in FILES.items():
        entry = {"rfilename": path.removeprefix(f"datasets/{NAME}/"), "size": len(data)}
        entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if path.endswith(".parquet"):
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        siblings.append(entry)
    return {"id": NAME, "sha": "c" * 40, "siblings": siblings}
