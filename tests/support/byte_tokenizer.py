"""A tokenizer without files for tests: ids are UTF-8 bytes, eos 256, bos 257 (or none)."""

import numpy as np


class ByteTokenizer:
    eos_id = 256
    vocab_size = 258

    def __init__(self, bos: bool = True) -> None:
        self.bos_id = 257 if bos else None
        self.fingerprint = f"bytes, bos {bos}"

    def encode_document(self, text: str) -> np.ndarray:
        """int32 [bos] bytes [eos]; lone surrogates become U+FFFD, as in the real tokenizer."""
        repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        ids = np.empty(len(repaired) + 2, np.int32)
        ids[0], ids[-1] = 257, self.eos_id
        ids[1:-1] = np.frombuffer(repaired, np.uint8)
        return ids if self.bos_id is not None else ids[1:]
