"""Where a job's sequences are computed: here, or by many workers that one driver feeds."""
