"""Ray clusters: started for one job, kept for many, or joined; their nodes, tokens and free resources.

connect          from the configuration to a Ray cluster that this process is a driver of
local_cluster    a cluster on this host for one job or one sweep, which can be restarted
ray_node         starts Ray's processes on this host: the head of a cluster, or a member
cluster_client   this process as a client of a cluster: the head, its published versions, the driver of a job
node_daemon      the process that keeps a node of a lasting cluster, or of one job, on this host
remote_hosts     a job's nodes on other hosts, over ssh or srun
ray_auth         the token that a cluster asks for
ray_internals    all uses of Ray's private API
placement        how many workers fit where, as pure arithmetic
status           the nodes of a cluster, what is free, and which jobs hold the rest
versions         whether two hosts run the same Python, libraries and code
"""
