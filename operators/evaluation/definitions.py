"""Definitions of all metrics, with their sources, as the report prints them.

Write `R[i, j]` for the accuracy on task j's test images after training task i, predicting among
all classes seen so far, `c[i, j]` for the number of correct ones and `q[j]` for their number.
"""

DEFINITIONS: dict[str, tuple[str, str, str]] = {
    "curve": (
        "Accuracy after task i",
        "A_i = 100 · Σ_{j≤i} c[i,j] / Σ_{j≤i} q[j], over all test images of the classes seen so "
        "far, predicting among all of them without knowing the task (micro average)",
        "LAMDA-PILOT, SLCA, EASE, MOS",
    ),
    "a_avg": (
        "Average incremental accuracy",
        "A_avg = mean over i = 0 .. T-1 of A_i, the first task included",
        "Rebuffi et al., iCaRL, CVPR 2017",
    ),
    "a_last": ("Last accuracy", "A_last = A_{T-1}", "LAMDA-PILOT"),
    "macro_task": (
        "Macro-task accuracy",
        "mean over tasks j ≤ i of R[i,j]; equals A_i when all tasks have equally many test images",
        "RanPAC, mammoth, L2P",
    ),
    "macro_class": (
        "Macro-class accuracy",
        "mean over the classes seen so far of the accuracy of each class",
        "LayUP",
    ),
    "forgetting": (
        "Forgetting",
        "F = mean over j < T-1 of (max over l = 0 .. T-1 of R[l,j] - R[T-1,j]); the last row is "
        "in the maximum, so F ≥ 0",
        "LAMDA-PILOT, mammoth",
    ),
    "forgetting_chaudhry": (
        "Forgetting (Chaudhry)",
        "mean over j < T-1 of (max over l = j .. T-2 of R[l,j] - R[T-1,j]); negative when the "
        "last task helped",
        "Chaudhry et al., Riemannian Walk, ECCV 2018",
    ),
    "forgetting_avalanche": (
        "Forgetting (Avalanche)",
        "mean over j < T-1 of (R[j,j] - R[T-1,j]) = -BWT",
        "ContinualAI Avalanche",
    ),
    "bwt": (
        "Backward transfer",
        "BWT = mean over j < T-1 of (R[T-1,j] - R[j,j])",
        "Lopez-Paz and Ranzato, GEM, NeurIPS 2017",
    ),
    "task_a_avg": (
        "Task-incremental accuracy",
        "as A_avg, with each prediction restricted to the classes of the image's own task: what "
        "the method would reach if the task were known at test time",
        "van de Ven et al., Three types of incremental learning, 2022",
    ),
}
"""Name -> (title, formula, source), as the report prints them."""


GROUPS: dict[str, tuple[str, str, str]] = {
    "a_auc": (
        "Area under the curve",
        "A_auc = mean of the accuracy on the test images of all classes shown so far, measured "
        "after every section of an online stream, the last one included",
        "Koh et al., i-Blurry, ICLR 2022",
    ),
    "base": (
        "Base accuracy",
        "accuracy on the test images of the first task's classes after the last task, predicting "
        "among all classes",
        "Tao et al., Few-Shot Class-Incremental Learning, CVPR 2020",
    ),
    "novel": (
        "Novel accuracy",
        "the same on the classes of all later tasks",
        "Tao et al., CVPR 2020",
    ),
    "harmonic": (
        "Harmonic accuracy",
        "2 · base · novel / (base + novel)",
        "Peng et al., Few-Shot Class-Incremental Learning from an Open-Set Perspective, ECCV 2022",
    ),
    "many": (
        "Many-shot accuracy",
        "accuracy on the test images of classes with many training images after the last task, "
        "predicting among all classes",
        "Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019",
    ),
    "transfer": (
        "Transfer",
        "mean over tasks i > 0 of the mean over j < i of the accuracy on task i after task j, when "
        "nothing was trained on its classes, choosing among the classes of task i",
        "Zheng et al., ZSCL, ICCV 2023",
    ),
    "average": (
        "Average over all tasks",
        "mean over all pairs (j, i) of the accuracy on task i after task j, later tasks included",
        "Zheng et al., ZSCL, ICCV 2023",
    ),
    "last": (
        "Last over all tasks",
        "mean over tasks i of the accuracy on task i after the last task",
        "Zheng et al., ZSCL, ICCV 2023",
    ),
    "transfer_union": (
        "Transfer, all classes",
        "as Transfer, choosing among the classes of all tasks",
        "Xu et al., RAIL (X-TAIL), NeurIPS 2024",
    ),
    "average_union": (
        "Average, all classes",
        "as Average over all tasks, choosing among the classes of all tasks",
        "Xu et al., RAIL (X-TAIL), NeurIPS 2024",
    ),
    "last_union": (
        "Last, all classes",
        "as Last over all tasks, choosing among the classes of all tasks",
        "Xu et al., RAIL (X-TAIL), NeurIPS 2024",
    ),
    "medium": (
        "Medium-shot accuracy",
        "the same for neither many nor few",
        "Liu et al., CVPR 2019",
    ),
    "few": ("Few-shot accuracy", "the same for classes with few", "Liu et al., CVPR 2019"),
}
"""The same for what only some streams are measured by."""
