"""Where a graph runs: Ray session, graph executor, job submission, deployment files.

    graph.py      which stages must be computed                      no Ray
    schedule.py   which of them may start now                        no Ray
    policy.py     what to do about a failure, as a value             no Ray
    worker.py     one stage on one worker                            no Ray
    chain.py      a chain of stages on each worker of a group        no Ray
    chains.py     which chain has a group, which waits for one       no Ray
    executor.py   the loop over them                                 no Ray until something must run
    pool.py       stages as Ray tasks, chains as worker groups
    training.py   a worker group of Ray Train
    session.py    a local Ray, or a cluster that is there already
    preflight.py  can the cluster run this graph, does it see the store
    jobs.py       submit, status, logs, stop

A graph that is stored in full never imports Ray.
"""
