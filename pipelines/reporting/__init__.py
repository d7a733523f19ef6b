"""Output for people: the report, plots, the leaderboard, tables on a terminal."""
