"""How people see and steer a job: commands, flags, progress, tables. No logic of the job."""
