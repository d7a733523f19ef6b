"""Execution of graphs: Ray sessions, the executor, submitted jobs, deployment files.

    execution/graph.py         which stages must be computed                no Ray
    execution/schedule.py      which of them may start now                  no Ray
    execution/policy.py        what to do about a failure, as a value       no Ray
    execution/worker.py        one stage on one worker                      no Ray
    execution/chain_worker.py  a chain of stages on each worker of a group  no Ray
    execution/chain_groups.py  which chain has a group, which waits         no Ray
    execution/executor.py      the loop over them                           no Ray until it must run
    execution/pool.py          stages as Ray tasks, chains as worker groups
    execution/train_group.py   a worker group of Ray Train
    execution/preflight.py     can the cluster run this graph, does it see the store
    sessions/session.py        a local Ray, or a cluster that is there already
    jobs.py                    submit, status, logs, stop
    inference.py               predictions of many images

A graph that is stored in full never imports Ray.
"""
