"""Training: tasks, loop, schedule, checkpoints, metrics. Imports neither faiss nor the teacher's side of words."""
