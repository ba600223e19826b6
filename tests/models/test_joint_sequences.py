"""Ranks that split text and images apart see them in their order again."""

import torch
from joint_runs import JOINT, joint
from ranks import on_ranks


def test_joint_sequences(tmp_path):
    names = list(JOINT)
    # one process as well, for its text is of another length than elsewhere
    (expected,) = on_ranks(1, joint, tmp_path, 1, names)
    for found in on_ranks(2, joint, tmp_path, 2, names):
        for name in names:
            (dense, sparse), (own_dense, own_sparse) = found[name], expected[name]
            assert torch.allclose(dense, own_dense, rtol=1e-5, atol=2e-6), name
            assert torch.allclose(sparse, own_sparse, rtol=1e-5, atol=2e-6), name
            assert not torch.allclose(sparse, dense, atol=1e-3), name
