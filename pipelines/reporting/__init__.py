"""What people look at: the report, plots, the leaderboard, tables on a terminal."""
