-- What versions 1 to 3 of the record's schema were made of.
-- version 1
create table projects (
    project text primary key,
    epoch   text,                       -- of the queue whose record this is
    rev     bigint,                     -- the cursor: everything up to here is recorded
    lost    bigint not null default 0,  -- events that were trimmed before they were recorded
    meta    json                        -- limits, lanes and counters
);
create table tasks (
    project text not null, task_id text not null, mission text not null, title text not null,
    description text, status text not null default 'pending',
    priority text not null default 'medium', lane text not null default 'any',
    dependencies text[] not null default '{}', metadata json,
    claimed_by text, claimed_at timestamptz, claim_ttl integer, lease_expires_at timestamptz,
    session text, fence bigint, rev bigint not null default 0,
    progress text, checkpoint text, summary text, completed_at timestamptz,
    failed_at timestamptz, failure_reason text, blocked_reason text,
    not_before timestamptz, max_runtime integer,
    retry_count integer not null default 0, expiry_count integer, late boolean,
    created_at timestamptz not null default now(),  -- to the microsecond: the order of tasks
    updated_at timestamptz not null default now(),
    waits text[], freed text[], hidden json,        -- what `restore` needs besides
    gone text, gone_at timestamptz,                 -- deleted, purged or missing: since when
    primary key (project, task_id)
);
create index tasks_status on tasks (project, status) where gone is null;
create table task_events (
    project text, rev bigint, task_id text not null, op text not null,
    from_status text, to_status text, fence bigint, agent text, at timestamptz not null, text text,
    primary key (project, rev)
);
create index task_events_task on task_events (project, task_id, rev);
create index task_events_at on task_events (at);
create table rejected (
    id bigint generated always as identity primary key, at timestamptz not null default now(),
    kind text not null, project text not null, task_id text, rev bigint, row json not null,
    code text not null, message text not null, unique (kind, project, task_id, rev)
);
-- version 2
create table edits (
    id bigint generated always as identity primary key,
    op uuid not null default gen_random_uuid(), at timestamptz not null default now(),
    by text not null, application text, kind text not null,  -- insert, update, delete
    project text not null, task_id text not null, old json, new json,
    done_at timestamptz, code text, message text             -- code: why it was refused
);
create index edits_open on edits (project, id) where done_at is null;
create function note_edit() returns trigger language plpgsql security definer
set search_path from current as $$
declare
    person text := current_setting('role');
    one tasks;
begin
    if current_setting('mosaic_queue.writer', true) = 'follower' then
        return null;
    elsif tg_op = 'TRUNCATE' then
        raise exception 'tasks is a record: delete its rows instead';
    elsif tg_op = 'UPDATE' and old::text = new::text or tg_op = 'DELETE' and old.gone is not null
    then
        return null;
    elsif tg_op = 'UPDATE' and old.gone is not null then
        raise exception 'task %/% is %: its row is history', old.project, old.task_id, old.gone;
    end if;
    if person = 'none' then person := session_user; end if;
    one := case when tg_op = 'INSERT' then new else old end;
    insert into edits (by, application, kind, project, task_id, old, new)
    values (person, current_setting('application_name'), lower(tg_op), one.project, one.task_id,
            case when tg_op <> 'INSERT' then row_to_json(old) end,
            case when tg_op <> 'DELETE' then row_to_json(new) end);
    perform pg_notify(tg_table_schema, '');
    return null;
end $$;
create trigger note_edit after insert or update or delete on tasks
    for each row execute function note_edit();
create trigger note_truncate before truncate on tasks execute function note_edit();
-- version 3
create view ready as
    select project, task_id, mission, lane, priority, title, created_at, not_before from tasks
    where gone is null and status = 'pending' and (not_before is null or not_before <= now())
    order by project, array_position('{critical,high,medium,low}', priority), created_at;
create view running as
    select project, task_id, mission, lane, status, title, claimed_by, claimed_at, progress,
           lease_expires_at, lease_expires_at - now() as remaining from tasks
    where gone is null and status in ('claimed', 'in-progress') order by lease_expires_at;
create view dead_letters as
    select project, task_id, mission, lane, title, failed_at, failure_reason, retry_count,
           expiry_count from tasks
    where gone is null and status = 'failed' order by failed_at desc;
create view throughput as
    select project, date_trunc('hour', at) as hour,
           count(*) filter (where op = 'create') as created,
           count(*) filter (where op in ('claim', 'next', 'assign')) as claimed,
           count(*) filter (where op = 'complete') as completed,
           count(*) filter (where op = 'fail') as failed,
           count(*) filter (where op = 'reap') as reaped from task_events group by 1, 2;
create view missions as
    select project, mission, count(*) as tasks,
           count(*) filter (where status = 'completed') as completed,
           count(*) filter (where status = 'failed') as failed,
           count(*) filter (where status in ('claimed', 'in-progress')) as running,
           min(created_at) as created_at, max(updated_at) as updated_at from tasks
    where gone is null or gone = 'purged' group by 1, 2;
create view mission_tasks as
    select project, mission, task_id from tasks where gone is null or gone = 'purged';
create rule task_stays as on delete to mission_tasks do instead nothing;
