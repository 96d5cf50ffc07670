import torch

from verl.model.packing import Piece, balanced_order, build_layout, pack, plan_micro_batches, split_to_count

PROMPTS = [4, 6, 3]
RESPONSES = [[2, 2, 2], [5, 1, 1], [1, 1, 9]]


def all_responses(plan):
    return sorted((piece.group, sample) for batch in plan for piece in batch for sample in piece.samples)


EVERY = [(group, sample) for group in range(3) for sample in range(3)]


def test_a_large_budget_packs_every_group_once():
    assert plan_micro_batches(PROMPTS, RESPONSES, 1000) == [[Piece(g, (0, 1, 2)) for g in range(3)]]


def test_a_group_over_the_budget_is_cut_over_its_responses_and_still_shares():
    plan = plan_micro_batches(PROMPTS, RESPONSES, 12)
    assert all_responses(plan) == EVERY
    assert plan[0] == [Piece(0, (0, 1, 2))]  # 4 + 2 + 2 + 2 = 10
    assert plan[1] == [Piece(1, (0, 1))]  # 6 + 5 + 1 = 12: exactly full
    assert plan[2] == [Piece(1, (2,)), Piece(2, (0, 1))]  # 7 + 5 = 12
    assert plan[3] == [Piece(2, (2,))]


def test_budget_is_a_cap_unless_a_single_response_exceeds_it():
    for budget in range(1, 40):
        plan = plan_micro_batches(PROMPTS, RESPONSES, budget)
        assert all_responses(plan) == EVERY
        for batch in plan:
            size = sum(piece.num_tokens(PROMPTS, RESPONSES) for piece in batch)
            assert size <= budget or (len(batch) == 1 and len(batch[0].samples) == 1)


def test_without_sharing_every_response_has_its_own_prompt():
    plan = plan_micro_batches(PROMPTS, RESPONSES, 1000, shared_prompt=False)
    assert all(len(piece.samples) == 1 for batch in plan for piece in batch)
    assert all_responses(plan) == EVERY


def test_split_to_count_keeps_every_response_and_pads_with_empty_batches():
    plan = plan_micro_batches(PROMPTS, RESPONSES, 1000)
    for count in range(1, 12):
        parts = split_to_count(plan, count)
        assert len(parts) == count
        assert all_responses(parts) == EVERY
    assert [] in split_to_count(plan, 10)


def test_mini_batches_hold_the_same_groups_on_any_number_of_ranks():
    lengths = [9, 1, 1, 1, 2, 8, 8, 2]
    for num_ranks in (1, 2, 4):
        order = balanced_order(lengths, mini_batch_size=4, num_ranks=num_ranks)
        assert sorted(order) == list(range(8))
        share = len(order) // num_ranks
        per_rank = [order[r * share : (r + 1) * share] for r in range(num_ranks)]
        for mini in range(2):
            size = 4 // num_ranks
            groups = [g for rank in per_rank for g in rank[mini * size : (mini + 1) * size]]
            assert sorted(groups) == list(range(mini * 4, mini * 4 + 4))
    two = balanced_order(lengths, 4, 2)
    loads = [sum(lengths[g] for g in two[r * 4 : r * 4 + 4]) for r in range(2)]
    assert max(loads) - min(loads) <= 8  # 9+1 against 1+1 is forced; 10 against 10 in the second mini-batch
    assert sum(lengths[g] for g in two[2:4]) == sum(lengths[g] for g in two[6:8]) == 10


def test_layout_sees_prompt_and_own_past_only():
    layout = build_layout([2, 1], [[2, 1], [3]])
    tables = layout.padded
    mask = tables.attention_mask[:, 0]  # [S, R, P + R], P = 2, R = 3
    assert mask[0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert mask[2].int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]
    assert tables.response_index[tables.response_mask].tolist() == [3, 4, 5, 6, 7, 8]
    assert tables.prompt_index[tables.prompt_mask].tolist() == [0, 1, 2]
    assert layout.group_ends.tolist() == [0, 3, 6] and layout.longest_group == 3


def test_pack_restarts_positions_at_the_prompts_end_and_predicts_from_it():
    prompts = [torch.tensor([10, 11, 12])]
    positions = [torch.tensor([[0, 1, 1], [0, 1, 2], [0, 1, 1]])]
    responses = [[torch.tensor([20, 21]), torch.tensor([30])]]
    batch = pack([Piece(0, (0, 1))], prompts, positions, responses, [[7]])
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 30]
    assert batch.position_ids[:, 3:].tolist() == [[3, 4, 3]] * 3
    assert batch.predict_index.tolist() == [2, 3, 2]
    assert batch.targets.tolist() == [20, 21, 30]
    assert batch.image_ids == [7]


def test_pack_puts_all_prompts_before_all_responses_and_keeps_their_order():
    prompts = [torch.tensor([10, 11]), torch.tensor([12]), torch.tensor([13, 14, 15])]
    positions = [torch.arange(len(ids)).expand(3, -1) + 5 * group for group, ids in enumerate(prompts)]
    responses = [[torch.tensor([20])], [torch.tensor([30])], [torch.tensor([40, 41]), torch.tensor([42, 43, 44])]]
    pieces = [Piece(2, (1, 0)), Piece(0, (0,))]
    batch = pack(pieces, prompts, positions, responses, [[4, 5], [6], [7]])
    assert batch.input_ids.tolist() == [13, 14, 15, 10, 11, 42, 43, 44, 40, 41, 20]
    assert batch.position_ids.tolist() == [[10, 11, 12, 0, 1, 13, 14, 15, 13, 14, 2]] * 3
    assert batch.predict_index.tolist() == [2, 5, 6, 2, 8, 4]
    assert batch.targets.tolist() == [42, 43, 44, 40, 41, 20]
    assert batch.image_ids == [7, 4, 5] and batch.pieces == pieces
    layout = batch.layout
    assert layout.num_prompt_tokens == 5 and layout.response_group.tolist() == [0, 0, 1]
    assert layout.prompt_ends.tolist() == [0, 3, 5] and layout.response_ends.tolist() == [0, 3, 5, 6]
    assert layout.group_ends.tolist() == [0, 5, 6] and layout.prompt_ends.dtype == torch.int32
    assert (layout.longest_prompt, layout.longest_response, layout.longest_group) == (3, 3, 5)


def test_a_batch_moves_whole():
    batch = pack([Piece(0, (0,))], [torch.tensor([1])], [torch.zeros(3, 1)], [[torch.tensor([2, 3])]], [[7]])
    same, moved = batch.to(torch.device("cpu")), batch.to(torch.device("meta"))
    for name in ("input_ids", "position_ids", "predict_index", "targets"):
        assert torch.equal(getattr(same, name), getattr(batch, name)) and getattr(moved, name).is_meta
    for name in ("prompt_ends", "response_ends", "group_ends", "response_group"):
        assert torch.equal(getattr(same.layout, name), getattr(batch.layout, name))
        assert getattr(moved.layout, name).is_meta
    assert moved.image_ids == [7] and moved.pieces == batch.pieces and moved.layout.longest_group == 2


def test_padded_tables_fill_with_index_zero():
    tables = build_layout([2, 1], [[2, 1], [3]]).padded
    assert tables.prompt_index.tolist() == [[0, 1], [2, 0]]
    assert tables.prompt_mask.tolist() == [[True, True], [True, False]]
    assert tables.response_index.tolist() == [[3, 4, 0], [5, 0, 0], [6, 7, 8]]
    assert tables.attention_mask.shape == (3, 1, 3, 5) and tables.attention_mask.dtype == torch.bool


def test_empty_responses_are_left_out_of_the_plan():
    assert plan_micro_batches([2, 2, 2], [[0, 3], [0, 0], [1, 0]], 100) == [[Piece(0, (1,)), Piece(2, (0,))]]


def test_a_plan_of_chosen_groups_keeps_their_order():
    assert plan_micro_batches(PROMPTS, RESPONSES, 1000, groups=[2, 0]) == [[Piece(2, (0, 1, 2)), Piece(0, (0, 1, 2))]]


def test_the_batch_of_most_responses_is_halved_first():
    first, second = Piece(0, (0, 1, 2)), Piece(1, (0, 1))
    plan = [[Piece(2, (0,))], [first, second, Piece(2, (1,))]]
    assert split_to_count(plan, 1) == plan  # none is joined
    assert split_to_count(plan, 3) == [[Piece(2, (0,))], [first], [second, Piece(2, (1,))]]
    assert split_to_count([[first]], 3) == [[Piece(0, (0,))], [Piece(0, (1,))], [Piece(0, (2,))]]
    assert split_to_count([[Piece(0, (0, 1))]], 3) == [[Piece(0, (0,))], [Piece(0, (1,))], []]
    assert split_to_count([], 2) == [[], []]


def test_the_longest_groups_go_first_to_the_rank_with_the_fewest_tokens():
    # 9 to rank 0, 5 and 4 to rank 1, which is full, 1 to rank 0; loads begin anew, and equal ones go in turn.
    assert balanced_order([1, 9, 5, 4, 3, 3, 3, 3], 4, 2) == [0, 1, 4, 6, 2, 3, 5, 7]
