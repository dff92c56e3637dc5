"""The service: a REST API, jobs that survive a killed process, and workers that do them.

The server process never decodes what clients send and never draws: :mod:`~beavervision.serve.guard` looks at uploads in a
child process with limits, :mod:`~beavervision.serve.worker` processes run the pipeline. All that they share is the job
table (:mod:`~beavervision.serve.jobs`) and the storage (:mod:`~beavervision.serve.storage`).
"""
