"""compressed_pack.py OUT FILE BITS DIM: the words that compressed-tensors packs FILE's values into.

FILE holds values (R, C) uint8 and packed, our words. Fails unless unpacking our words gives the values back.
"""

import sys

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

if __name__ == "__main__":
    out, file, bits, dim = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    with np.load(file, allow_pickle=False) as arrays:
        values, packed = torch.from_numpy(arrays["values"]), torch.from_numpy(arrays["packed"])
    signed = (values.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    back = unpack_from_int32(packed, bits, values.shape, packed_dim=dim)
    assert torch.equal(back, signed), "compressed-tensors reads other integers from our words"
    np.save(out, pack_to_int32(signed, bits, packed_dim=dim).numpy(), allow_pickle=False)
