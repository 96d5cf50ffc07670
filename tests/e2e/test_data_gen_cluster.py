"""The stages of data generation over Ray Data on a cluster of this machine."""

import pytest

from data_gen.generate_data import main
from data_gen.records import read_records

pytestmark = pytest.mark.e2e


def test_blocks_over_ray_data_give_the_rows_of_their_scenes(tmp_path):
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        out = tmp_path / "t.csv"
        command = ["preprocess_on_cluster", "--provider=template", "--source=synthetic:90", f"--out={out}"]
        for _ in range(2):  # the second run finds every block done
            assert main([*command, "--block_rows=40"]) == 0
            records = list(read_records(out))
            assert [r.image_id for r in records] == [f"synthetic-0-{i:06d}" for i in range(90)]
        journals = sorted((tmp_path / "t" / "blocks").glob("*.jsonl"))
        assert [len(path.read_text().splitlines()) - 1 for path in journals] == [40, 40, 10]
    finally:
        ray.shutdown()
