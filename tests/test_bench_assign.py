import torch

from bowstore.benchmarks.assign import bench_assign
from bowstore.environment import cores


def test_bench_assign_times_all_ways_on_the_same_vectors() -> None:
    result = bench_assign(images=2, positions=9, dimensions=12, num_words=40, rounds=3, device=torch.device("cpu"))
    value = result.as_dict()
    rates = value["images_per_second"]
    assert list(rates) == ["assign", "matrix product", "FAISS"]
    assert all(len(way["rounds"]) == 3 for way in rates.values())
    assert {"positions": 9, "dimensions": 12, "words": 40, "threads": cores()}.items() <= value.items()
    ratios = [a / b for a, b in zip(rates["assign"]["rounds"], rates["matrix product"]["rounds"], strict=True)]
    assert value["ratio_over_matmul"] == sorted(ratios)[1]
    assert value["teraflops"] == 2 * 9 * 12 * 40 * rates["assign"]["median"] / 1e12
    assert "ratio_over_matmul" in result.text()
