"""Which vocabulary the ids of a prepared file belong to: its fingerprint, FILE.npy.json beside FILE.npy.

It is copied with `cp pretrain_train.npy*`, and a file without one still works.
"""

import json
import os

from config import read_json
from flags import numbered_texts
from script import InputError, atomic_write, note


def fingerprint_path(path):
    """The file that holds the fingerprint of the prepared file `path`."""
    return f"{path}.json"


def write_fingerprint(path, tokenizer):
    """Record which vocabulary a prepared file was made with. Raises InputError."""
    content = {"vocabulary": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
               "pad_id": tokenizer.pad_id, "bytes": os.path.getsize(path)}
    with atomic_write(fingerprint_path(path), "w") as file:
        json.dump(content, file)


def read_fingerprint(path):
    """What `write_fingerprint` recorded, a dict; None if there is nothing or it describes another file."""
    if not os.path.exists(path) or not os.path.exists(fingerprint_path(path)):
        return None
    content = read_json(fingerprint_path(path))
    for key, kind in (("vocabulary", str), ("pad_id", int), ("bytes", int)):
        if not isinstance(content.get(key), kind):
            raise InputError(f'{fingerprint_path(path)}: the key "{key}" is missing or wrong; '
                             "run python data.py again")
    # An array that was replaced by hand, without its fingerprint, has in general another size.
    return content if content["bytes"] == os.path.getsize(path) else None


def check_vocabulary(path, tokenizer):
    """Check that the prepared file `path` was made with the vocabulary of `tokenizer`.

    A file without a fingerprint is not checked, and a note says so, once for all files of a folder. Raises
    InputError naming the file if its vocabulary is another one."""
    content = read_fingerprint(path)
    if content is None:
        note(f"{os.path.dirname(path) or os.curdir}: files without a fingerprint (an older data.py wrote "
             f"none), so it is not checked whether their vocabulary is that of {tokenizer.name}")
    elif content["vocabulary"] != tokenizer.fingerprint:
        pairs = [pair for pair in numbered_texts(path)
                 if (read_fingerprint(pair[0]) or {}).get("vocabulary") == tokenizer.fingerprint]
        if pairs:
            raise InputError(f"{path}: is left from before data.py wrote {len(pairs)} texts; train on them "
                             f"with --dataset_path '{json.dumps(pairs, ensure_ascii=False)}'")
        raise InputError(f"{path}: prepared with another vocabulary than {tokenizer.name}; run python "
                         "data.py again with all inputs together, or with --tokenizer FILE to keep one")
