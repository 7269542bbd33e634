"""A process that joins others, before it is one of them."""

import io
import re
import socket
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jax._src import distributed, xla_bridge
from jax._src.clusters import k8s_cluster

from jaxgpt import heartbeat, processes
from jaxgpt.errors import InputError
from jaxgpt.parallel_settings import ProcessSettings

pytestmark = pytest.mark.slow


def test_who_waits_for_the_first_process_is_told_and_then_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(processes, "_PATIENCE", 1.5)
    monkeypatch.setattr(processes, "_SILENCE", 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = ProcessSettings(distributed=True, coordinator_address=address, num_processes=2, process_id=1)
        message = f"^--coordinator-address {address} cannot be reached .*; process 0 must run there"
        with pytest.raises(InputError, match=message), processes.joined(settings):
            raise AssertionError("joined nobody")
    assert capsys.readouterr().err == f"waiting at {address} for the other processes of this run, 1.5 s at most\n"


def test_the_first_process_is_reached_once_it_listens():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        processes._reach(f"[::1]:{server.getsockname()[1]}", until=0)
        connection, address = server.accept()
        connection.close()
    assert address[0] == "::1"


def test_a_name_that_is_none_is_refused_at_once():
    with pytest.raises(InputError, match=r"^--coordinator-address a\.\.b:1 cannot be reached"):
        processes._reach("a..b:1", until=float("inf"))


# -- Kubernetes, as docs/many-devices.md sets it up ----------------------------------------

GUIDE = Path(__file__).parents[1] / "docs" / "many-devices.md"
CLIENT = ("kubernetes", "kubernetes.config", "kubernetes.client", "kubernetes.client.exceptions")


class Refused(Exception):
    """What the API's client raises where the service account may not ask."""

    status, reason = 403, "Forbidden"


class Cluster:
    """A pod of the guide's Job: what Kubernetes makes of its manifests, as far as JAX asks for it."""

    def __init__(self) -> None:
        [text] = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
        self.manifests: dict[str, Any] = {one["kind"]: one for one in yaml.safe_load_all(text)}

    def allowed(self, group: str, resource: str, verb: str) -> None:
        pod, account = self.manifests["Job"]["spec"]["template"]["spec"], self.manifests["ServiceAccount"]
        role, binding = self.manifests["Role"], self.manifests["RoleBinding"]
        assert pod["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        if not any(
            group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]
            for rule in role["rules"]
        ):
            raise Refused

    def labels(self) -> dict[str, str]:
        return {"job-name": self.manifests["Job"]["metadata"]["name"]}

    def list_namespaced_pod(self, *, namespace: str, field_selector: str) -> Any:
        self.allowed("", "pods", "list")
        assert (namespace, field_selector) == ("here", "status.podIP=10.0.0.7")
        spec = self.manifests["Job"]["spec"]["template"]["spec"]
        owner = SimpleNamespace(controller=True, kind=self.manifests["Job"]["kind"])
        metadata = SimpleNamespace(name="base-1-x7", labels=self.labels(), owner_references=[owner])
        pod = SimpleNamespace(metadata=metadata, spec=SimpleNamespace(subdomain=spec.get("subdomain")))
        return SimpleNamespace(items=[pod])

    def read_namespaced_job(self, *, name: str, namespace: str) -> Any:
        self.allowed("batch", "jobs", "get")
        job = self.manifests["Job"]
        assert (name, namespace) == (job["metadata"]["name"], "here")
        return SimpleNamespace(
            metadata=SimpleNamespace(name=name, labels=self.labels()),
            spec=SimpleNamespace(parallelism=job["spec"]["parallelism"]),
        )

    def list_namespaced_service(self, namespace: str) -> Any:
        self.allowed("", "services", "list")
        return SimpleNamespace(items=[])

    def address(self, name: str) -> str:
        """DNS: of the pod itself, and through a headless Service of its subdomain that selects it, of another."""
        service = self.manifests["Service"]
        chosen = service["spec"]["selector"].items() <= self.labels().items()
        headless = service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] and chosen
        if name == "base-1":
            return "10.0.0.7"
        if headless and name == f"base-0.{service['metadata']['name']}":
            return "10.0.0.6"
        raise socket.gaierror(f"no {name}")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Generator[Cluster]:
    """The second pod of the guide's Job, with JAX's client replaced by the arguments that it would be made of."""
    made = Cluster()
    modules = {name: SimpleNamespace() for name in CLIENT}
    modules["kubernetes"].config = SimpleNamespace(load_incluster_config=lambda: None)
    modules["kubernetes"].client = SimpleNamespace(
        CoreV1Api=lambda: made, BatchV1Api=lambda: made, exceptions=SimpleNamespace(ApiException=Refused)
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("HOSTNAME", "base-1")
    if made.manifests["Job"]["spec"]["completionMode"] == "Indexed":
        monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setattr(socket, "gethostbyname", made.address)
    monkeypatch.setattr(k8s_cluster, "open", lambda _: io.StringIO("here\n"), raising=False)
    monkeypatch.setattr(k8s_cluster.time, "sleep", lambda _: None)
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(distributed, "global_state", distributed.State())
    yield made
    for method in ("_namespace", "_pod", "_job", "_headless_svc", "_controller"):
        getattr(k8s_cluster.K8sCluster, method).__func__.cache_clear()


def test_the_guides_job_tells_a_pod_which_process_it_is(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def client(*given: Any, **_: Any) -> Any:
        asked.extend(given)
        return SimpleNamespace(connect=lambda: None)

    monkeypatch.setattr(distributed, "_jax", SimpleNamespace(get_distributed_runtime_client=client))
    monkeypatch.setattr(heartbeat, "Heartbeat", lambda seconds: SimpleNamespace(leave=lambda: None))
    processes._join(ProcessSettings(distributed=True))
    state = distributed.global_state
    assert (state.process_id, state.num_processes) == (1, cluster.manifests["Job"]["spec"]["completions"])
    host, _, port = asked[0].rpartition(":")
    assert cluster.address(host) == "10.0.0.6"
    assert int(port)


def test_a_pod_that_may_not_ask_or_has_no_package_to_ask_with_is_told_so_in_one_line(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    cluster.manifests["Role"]["rules"].pop()
    with pytest.raises(InputError, match=r"^--distributed: Kubernetes API Error: 403 .* service account") as refused:
        processes._join(ProcessSettings(distributed=True))
    assert "\n" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    message = r"^--distributed: neither Slurm, .* `kubernetes` package is not installed .*jax\[k8s\]"
    with pytest.raises(InputError, match=message) as missing:
        processes._join(ProcessSettings(distributed=True))
    assert "\n" not in str(missing.value)
