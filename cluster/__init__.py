"""Where a graph runs: Ray session, graph executor, job submission, deployment files.

    graph.py      which stages must be computed                      no Ray
    schedule.py   which of them may start now                        no Ray
    policy.py     what to do about a failure, as a value             no Ray
    worker.py     one stage on one worker                            no Ray
    executor.py   the loop over the four above                       no Ray until something must run
    pool.py       stages as Ray tasks
    session.py    a local Ray, or a cluster that is there already
    preflight.py  can the cluster run this graph, does it see the store
    jobs.py       submit, status, logs, stop

A graph that is stored in full never imports Ray.
"""
