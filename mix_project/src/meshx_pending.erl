%% Requests to the agent that have no answer yet, and who waits for it.
-module(meshx_pending).

-export([is_waited/2, from/1, replies/2, next_id/1]).
-export_type([kind/0]).

%% What to do with a reply; `abandoned' when its caller gave up.
-type kind() ::
    {call, gen_statem:from()}
    | {register, undefined | gen_statem:from()}
    | {session, meshx_agent:name(), gen_statem:from()}
    | abandoned.

-spec is_waited(integer(), kind()) -> boolean().
is_waited(_, {_, From}) -> From =/= undefined;
is_waited(_, {session, _, _}) -> true;
is_waited(_, abandoned) -> false.

-spec from(kind()) -> gen_statem:from().
from({session, _, From}) -> From;
from({_, From}) -> From.

-spec replies(kind(), meshx_agent:result()) -> [{reply, gen_statem:from(), meshx_agent:result()}].
replies({_, undefined}, _) -> [];
replies({session, _, From}, Reply) -> [{reply, From, Reply}];
replies({_, From}, Reply) -> [{reply, From, Reply}];
replies(abandoned, _) -> [].

%% Below 2^27, so that the number is an INTEGER_EXT everywhere; 0 is hello's.
-spec next_id(integer()) -> integer().
next_id(Id) when Id >= 16#7ffffff -> 1;
next_id(Id) -> Id + 1.
