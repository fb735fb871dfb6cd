"""What each stage can do on this machine, and which one binds."""
