-- version 2
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
