"""How people see and steer a job: flags, progress, tables, the demo. No logic of the job."""
