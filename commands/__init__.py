"""What main.py does besides training: plan, suggest, doctor, evaluate, predict."""
