"""Random networks: each is sealed and equal to autograd on one sample at a time, or refused. ``tools/fuzz`` runs more."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings
from networks import Network, Verdict, judge, networks, tally

NETWORKS = 60


def test_sixty_random_networks_are_sealed_and_right_or_refused_never_wrong() -> None:
    judged: list[tuple[Network, Verdict]] = []

    @settings(max_examples=NETWORKS, phases=[Phase.generate], suppress_health_check=list(HealthCheck), deadline=None)
    @given(networks())
    def run(network: Network) -> None:
        judged.append((network, judge(network)))

    run()
    wrong = [(n.text, v.why) for n, v in judged if v.kind == "wrong"]
    assert wrong == []
    kinds = tally(judged)["kinds"]
    assert kinds["sealed"] >= NETWORKS // 2, kinds  # a fuzz that refuses everything proves nothing
    assert any(n.mixes and v.kind == "refused" for n, v in judged)
