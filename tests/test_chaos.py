from benchmarks import chaos


def test_a_run_that_is_killed_eight_times_loses_nothing(tmp_path):
    """In most phases once; `python -m benchmarks.chaos` has all of them, as often as one likes."""
    rows = chaos.chaos(8, 1, tmp_path)
    assert sum(kills for _, kills, _, _ in rows) == 8
    for phase, kills, resumed, equal in rows:
        assert (resumed, equal) == (kills, kills), phase
