"""The environment of a worker, as a table over its host's, its driver's and its order."""

from dataclasses import replace

import pytest

from cluster.worker.worker_env import describe_forwarded, forwarded_variables, worker_environment

CPU_DEFAULTS = {"CUDA_VISIBLE_DEVICES": "", "TORCH_GLOO_LAZY_INIT": "1"}
GPU = {"device": "gpu", "gpus": ("3",)}
ALLOC = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def environment(order, own=None, **fields):
    order = replace(order, **{"env": {}, "log": "/run/logs/rank_0.log", **fields})
    return worker_environment(own or {}, order, "/tmp/trireme-a", "/tmp/trireme-cache-0")


@pytest.mark.parametrize(
    ("own", "fields", "expected"),
    [
        # what is no business of NCCL or torch stays what it is on the host
        ({"PATH": "/bin", "HOME": "/root"}, {}, {"PATH": "/bin", "HOME": "/root"}),
        # what is, comes from the driver: its values hold on every rank, and what it lacks, no rank has
        ({"NCCL_ALGO": "Tree"}, {"forwarded": {"NCCL_ALGO": "Ring"}}, {"NCCL_ALGO": "Ring"}),
        ({"NCCL_ALGO": "Tree", "FI_EFA_FORK_SAFE": "1"}, {}, {"NCCL_ALGO": None, "FI_EFA_FORK_SAFE": None}),
        # what the fork server was started with is ours
        ({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}, {}, {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}),
        # names of a host's own devices and folders: its own first, then the driver's
        ({"NCCL_IB_HCA": "mlx5"}, {"forwarded": {"NCCL_IB_HCA": "bnxt"}}, {"NCCL_IB_HCA": "mlx5"}),
        ({}, {"forwarded": {"NCCL_IB_HCA": "bnxt"}}, {"NCCL_IB_HCA": "bnxt"}),
        ({"CUDA_HOME": "/opt/cuda"}, {}, {"CUDA_HOME": "/opt/cuda"}),
        # cluster.env and the rank's own come before all
        ({"NCCL_IB_HCA": "a"}, {"env": {"NCCL_IB_HCA": "b", "RANK": "1"}}, {"NCCL_IB_HCA": "b", "RANK": "1"}),
        ({}, {"forwarded": {"NCCL_ALGO": "Ring"}, "env": {"NCCL_ALGO": "Tree"}}, {"NCCL_ALGO": "Tree"}),
        # the interface of the node's address, exactly it, unless anybody says another
        ({}, {"interface": "eth1"}, {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, {"interface": "eth1"}, {"NCCL_SOCKET_IFNAME": "ib0"}),
        ({}, {"interface": "eth1", "forwarded": {"GLOO_SOCKET_IFNAME": "eth0"}}, {"GLOO_SOCKET_IFNAME": "eth0"}),
        ({}, {}, {"NCCL_SOCKET_IFNAME": None, "GLOO_SOCKET_IFNAME": None}),
        # gloo's connections as they are used, unless the user says otherwise
        ({}, {"env": {"TORCH_GLOO_LAZY_INIT": "0"}}, {"TORCH_GLOO_LAZY_INIT": "0"}),
        # on a CPU there is nothing to tell CUDA
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, {}, {**CPU_DEFAULTS, "PYTORCH_ALLOC_CONF": None, "TRITON_CACHE_DIR": None}),
        # a GPU rank sees its own device, whatever its fork server sees
        ({"CUDA_VISIBLE_DEVICES": "0"}, GPU, {"CUDA_VISIBLE_DEVICES": "3"}),
        ({}, {"device": "gpu", "gpus": ("MIG-1a",)}, {"CUDA_VISIBLE_DEVICES": "MIG-1a"}),
        # memory that grows in place, unless the user has settings under either name
        ({}, GPU, ALLOC),
        ({}, {**GPU, "forwarded": {"PYTORCH_ALLOC_CONF": "backend:native"}}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({}, {**GPU, "env": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}}, {"PYTORCH_ALLOC_CONF": None}),
        # NCCL's flight recorder
        (
            {},
            GPU,
            {
                "TORCH_FR_BUFFER_SIZE": "20000",
                "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
                "TORCH_FR_DUMP_TEMP_FILE": "/run/logs/nccl_rank_",
                "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": "/tmp/trireme-a/nccl_rank_",
            },
        ),
        ({}, {**GPU, "env": {"TORCH_FR_BUFFER_SIZE": "0"}}, {"TORCH_FR_BUFFER_SIZE": "0"}),
        # compiled kernels on the host's own disk
        ({}, GPU, {"TRITON_CACHE_DIR": "/tmp/trireme-cache-0/triton"}),
        ({"TRITON_CACHE_DIR": "/nvme/triton"}, GPU, {"TRITON_CACHE_DIR": "/nvme/triton"}),
    ],
)
def test_environment_of_a_worker_by_who_says_what(order, own, fields, expected):
    made = environment(order, own, **fields)
    assert {name: made.get(name) for name in expected} == expected


def test_ranks_of_hosts_with_other_shells_have_the_same_variables(order):
    driver = {"NCCL_ALGO": "Ring", "TORCH_DISTRIBUTED_DEBUG": "INFO"}
    hosts = ({"NCCL_ALGO": "Tree", "NCCL_DEBUG": "WARN"}, {"FI_PROVIDER": "efa"})
    first, second = (environment(order, own, forwarded=forwarded_variables(driver)) for own in hosts)
    assert first == second
    assert first["NCCL_ALGO"] == "Ring"


def test_no_cache_is_named_where_this_user_has_no_private_folder_for_it(order):
    made = worker_environment({}, replace(order, device="gpu", gpus=("0",)), "/tmp/trireme-a", None)
    assert "TRITON_CACHE_DIR" not in made


@pytest.mark.parametrize(
    ("environ", "forwarded"),
    [
        ({"NCCL_DEBUG": "INFO", "FI_PROVIDER": "efa", "UCX_TLS": "rc", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}, "all"),
        ({"TORCH_LOGS": "dynamo", "PYTORCH_ALLOC_CONF": "backend:native", "TRITON_DEBUG": "1"}, "all"),
        ({"CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin", "TORCHELASTIC_RUN_ID": "1", "WANDB_API_KEY": "k"}, "none"),
        ({"NCCL_AUTH_TOKEN": "very-secret", "TORCH_HUB_PASSWORD": "very-secret"}, "none"),
    ],
)
def test_driver_forwards_shared_variables_but_no_secret_and_no_device(environ, forwarded):
    assert forwarded_variables(environ) == (environ if forwarded == "all" else {})


def test_head_of_a_run_names_what_was_forwarded_without_secrets(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "very-secret")
    environ = {"NCCL_DEBUG": "INFO", "NCCL_AUTH_TOKEN": "x", "TORCH_PROXY": "http://me:pw@host/very-secret"}
    assert describe_forwarded(environ) == (
        "every worker gets from this shell: NCCL_DEBUG=INFO, TORCH_PROXY=http://[hidden]@host/[hidden]"
    )
    assert not describe_forwarded({"PATH": "/bin"})
